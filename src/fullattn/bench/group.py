"""Measure several workloads side by side: peak memory, warm-up, interleaved timing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from fullattn._cli.conditions import Mode
from fullattn.bench.measure import Failure, Plan, clock_for, interleave, warm_up
from fullattn.bench.memory import CpuMemory, cuda_peak
from fullattn.bench.results import Measurement
from fullattn.bench.workload import Recipe, Workload

__all__ = ["LeftOut", "measure_group"]

Key = TypeVar("Key", bound=Hashable)


class LeftOut(Exception):  # noqa: N818
    """A workload is not measured, for the reason given."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def measure_group(
    workloads: Mapping[Key, Workload],
    recipes: Mapping[Key, Recipe],
    mode: Mode,
    plan: Plan,
    memory: CpuMemory | None,
    *,
    peaks: bool = True,
    admit: Callable[[Key], float | None] = lambda key: None,
    warmed: Callable[[Key, float], object] = lambda key, seconds: None,
    step: Callable[[Key, float], object] = lambda key, part: None,
    last_call: float = math.inf,
) -> dict[Key, Measurement]:
    """Measure workloads on one device in one mode.

    Args:
        workloads: by key.
        recipes: for the process that measures memory, by the same keys.
        mode: "inference" or "training".
        plan: how often a call is timed, and how long it may take.
        memory: the process that measures peaks on the CPU; None to leave them out.
        peaks: whether to measure peaks on CUDA.
        admit: returns a forecast of a call in seconds, or raises `LeftOut`.
        warmed: called with the seconds of a call after the warm-up.
        step: called with the part of a workload's measurement that is done.
        last_call: time (monotonic) after which each workload is timed at most once.

    Returns:
        Times and peaks by key; a workload that was left out or failed has the reason.
    """
    calls: dict[Key, int] = {}
    found: dict[Key, int | None] = {}
    failures: dict[Key, Failure] = {}
    clock = clock_for(next(iter(workloads.values())).x.device)
    for key, workload in workloads.items():
        try:
            forecast = admit(key)
            if memory is not None:
                probe = memory.probe(recipes[key], mode, plan.limit)
                if isinstance(probe, Failure):
                    raise LeftOut(probe)
                found[key], forecast = probe.peak_bytes, probe.seconds
            seconds = warm_up(workload, mode, clock, forecast)
            if seconds > plan.limit:
                raise LeftOut(Failure.too_slow(None, plan.limit))
            if peaks and workload.x.device.type == "cuda":
                found[key] = cuda_peak(workload, mode)
            warmed(key, seconds)
            calls[key] = plan.calls(seconds)
        except LeftOut as left:
            failures[key] = left.failure
        except Exception as error:
            failures[key] = Failure.of(error)
        step(key, 1 if key in failures else 0.25)

    def is_enough(times_ms: list[float]) -> bool:
        spent = sum(times_ms) / 1e3
        return plan.repeats is None and (time.monotonic() > last_call or spent > plan.limit)

    times, failed = interleave(
        {key: workloads[key] for key in calls},
        calls,
        mode,
        clock,
        step=lambda key: step(key, 0.75 / calls[key]),
        enough=is_enough,
    )
    failures |= failed
    return {
        key: Measurement(times.get(key, []), found.get(key), failures.get(key)) for key in workloads
    }
