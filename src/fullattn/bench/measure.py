"""Measure several workloads side by side: peak memory, warm-up, interleaved timing.

A round of timing calls each workload once, so that a machine that slows down affects all alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from fullattn._cli.conditions import Mode
from fullattn.bench.memory import cpu_peak, cuda_peak
from fullattn.bench.results import Failure, Measurement
from fullattn.bench.workload import Recipe, Workload

__all__ = ["Plan", "interleave", "measure_group", "sharing", "warm_up"]

Key = TypeVar("Key", bound=Hashable)
Group = TypeVar("Group")


@dataclass(frozen=True)
class Plan:
    """How often a call is timed, and whether its peak memory is measured.

    Attributes:
        seconds: for one implementation at one shape in one mode.
        repeats: exactly so many calls; None to fit them into `seconds`.
        limit: seconds that one call may take; also what an implementation may spend on timed calls.
        budget: seconds for the whole run, shared evenly by all shapes and modes; None for no end.
        memory: whether to measure peak memory.
        at_least: calls however slow they are.
        at_most: calls however fast they are.
    """

    seconds: float = 2.0
    repeats: int | None = None
    limit: float = 10.0
    budget: float | None = None
    memory: bool = True
    at_least: int = 3
    at_most: int = 20

    def calls(self, seconds_per_call: float) -> int:
        """Return how often to time a call that takes so long."""
        if self.repeats is not None:
            return self.repeats
        fit = int(self.seconds / max(seconds_per_call, 1e-9))
        return min(max(fit, self.at_least), self.at_most)


def sharing(groups: Sequence[Group], budget: float | None) -> Iterator[tuple[Group, float]]:
    """Yield each group with the time (monotonic) at which its share of the budget ends.

    What a group leaves of its share goes to those after it.
    """
    began = time.monotonic()
    for number, group in enumerate(groups, start=1):
        yield group, math.inf if budget is None else began + number / len(groups) * budget


def warm_up(workload: Workload, mode: Mode, forecast: float | None = None) -> float:
    """Call a workload until it is warm.

    A call of more than a second is warmed up on a corner of its input: the overhead of an
    operator's first call is then a small part of the time measured.

    Args:
        workload: what to call.
        mode: "inference" or "training".
        forecast: seconds that a call takes, where that is known.

    Returns:
        Seconds that a call takes.

    Raises:
        Exception: whatever the module raises.
    """
    if forecast is not None and forecast > 1.0:
        workload.warm_up_small(mode)
        return forecast
    # The first call on CUDA may compile or choose kernels; the second is like those that follow.
    for _ in range(2):
        seconds = workload.milliseconds(mode) / 1e3
        if seconds > 1.0:
            break
    workload.prepare(mode)
    return seconds


def interleave(
    workloads: Mapping[Key, Workload],
    calls: Mapping[Key, int],
    mode: Mode,
    *,
    step: Callable[[Key], object] = lambda key: None,
    enough: Callable[[list[float]], bool] = lambda times: False,
) -> tuple[dict[Key, list[float]], dict[Key, Failure]]:
    """Time all workloads round by round.

    There are as many rounds as the largest number of calls; a workload with fewer calls is called
    in rounds spread evenly over them.

    Args:
        workloads: by key.
        calls: how often each is timed; those without an entry are not.
        mode: "inference" or "training".
        step: called with the key after every call.
        enough: called with a workload's times; whether to time it no more.

    Returns:
        Milliseconds of each call in the order they were made, and the workloads that failed;
        every key of `calls` is in exactly one of the two.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    failures: dict[Key, Failure] = {}
    rounds = max(calls.values(), default=0)
    for turn in range(rounds):
        for key, number in calls.items():
            due = (turn + 1) * number // rounds - turn * number // rounds
            if not due or key in failures or (times[key] and enough(times[key])):
                continue
            try:
                times[key].append(workloads[key].milliseconds(mode))
            except Exception as error:
                failures[key] = Failure.of(error)
                del times[key]
            workloads[key].prepare(mode)
            step(key)
    return times, failures


def measure_group(
    workloads: Mapping[Key, Workload],
    recipes: Mapping[Key, Recipe],
    mode: Mode,
    plan: Plan,
    *,
    refuse: Callable[[Key], Failure | None] = lambda key: None,
    step: Callable[[Key, float], object] = lambda key, part: None,
    last_call: float = math.inf,
) -> dict[Key, Measurement]:
    """Measure workloads on one device in one mode.

    Args:
        workloads: by key.
        recipes: for the processes that measure memory, by the same keys.
        mode: "inference" or "training".
        plan: how often a call is timed, and how long it may take.
        refuse: asked before a workload is begun; the reason to leave it out.
        step: called with the part of a workload's measurement that is done.
        last_call: time (monotonic) after which each workload is timed at most once.

    Returns:
        Times and peaks by key; a workload that was left out or failed has the reason.
    """
    calls: dict[Key, int] = {}
    peaks: dict[Key, int] = {}
    failures: dict[Key, Failure] = {}

    def begin(key: Key) -> Failure | None:
        workload, forecast = workloads[key], None
        step(key, 0)
        if failure := refuse(key):
            return failure
        device = workload.x.device.type  # on others than these two no peak is measured
        if plan.memory and device == "cpu":
            probe = cpu_peak(recipes[key], mode, plan.limit)
            if isinstance(probe, Failure):
                return probe
            if probe is not None:
                peaks[key], forecast = probe.peak_bytes, probe.seconds
        try:
            seconds = warm_up(workload, mode, forecast)
            if seconds > plan.limit:
                return Failure.too_slow(plan.limit)
            if plan.memory and device == "cuda":
                peaks[key] = cuda_peak(workload, mode)
        except Exception as error:
            return Failure.of(error)
        calls[key] = plan.calls(seconds)
        return None

    for key in workloads:
        if failure := begin(key):
            failures[key] = failure
        step(key, 1 if failure else 0.25)

    def is_enough(times_ms: list[float]) -> bool:
        spent = sum(times_ms) / 1e3
        return plan.repeats is None and (time.monotonic() > last_call or spent > plan.limit)

    times, failed = interleave(
        workloads, calls, mode, step=lambda key: step(key, 0.75 / calls[key]), enough=is_enough
    )
    failures |= failed
    return {
        key: Measurement(times.get(key, []), peaks.get(key), failures.get(key)) for key in workloads
    }
