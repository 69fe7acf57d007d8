"""Interleaved timing: a round calls each implementation once, so that drift affects all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from fullattn._cli.conditions import Mode
from fullattn._cli.errors import describe
from fullattn.attention import BackendError
from fullattn.bench.workload import Workload

__all__ = [
    "Clock",
    "CpuClock",
    "CudaClock",
    "Failure",
    "Plan",
    "clock_for",
    "interleave",
    "warm_up",
]

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Failure:
    """Why a row has no figure; the run goes on without it.

    Attributes:
        kind: two or three words for the table.
        reason: one sentence for the notes under it.
    """

    kind: str
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Read an exception that an implementation raised."""
        if isinstance(error, BackendError):
            return cls("cannot run", str(error))
        # PyTorch's CPU allocator raises a plain RuntimeError.
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if out_of_memory or "can't allocate memory" in str(error):
            return cls("out of memory", describe(error))
        return cls("failed", describe(error))

    @classmethod
    def too_slow(cls, seconds: float | None, limit: float) -> Failure:
        """Report a call above the limit; `seconds` is its forecast, None if it was tried."""
        took = (
            f"one call did not end within {limit:g} s"
            if seconds is None
            else f"one call would take about {seconds:.0f} s by its FLOPs, the limit is {limit:g} s"
        )
        return cls("too slow", f"{took} (--limit)")

    @classmethod
    def no_time_left(cls, budget: float) -> Failure:
        """Report that the run has used up its time before this row."""
        return cls(
            "no time left", f"not begun within its share of the run's {budget:g} s (--budget)"
        )


class Clock(Protocol):
    """Measures calls on one kind of device."""

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Run the call once."""
        ...


class CpuClock:
    """Wall-clock time."""

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Run the call once."""
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


class CudaClock:
    """Time between two events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Run the call once and wait for it."""
        with torch.cuda.device(self.device):
            event: Any = torch.cuda.Event  # its stubs have no types
            start, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end))


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Plan:
    """How often a call is timed.

    Attributes:
        seconds: for one implementation at one shape in one mode.
        repeats: exactly so many calls; None to fit them into `seconds`.
        limit: seconds that one call may take; also what an implementation may spend on timed calls.
        budget: seconds for the whole run, shared evenly by all shapes and modes; None for no end.
        at_least: calls however slow they are.
        at_most: calls however fast they are.
    """

    seconds: float = 2.0
    repeats: int | None = None
    limit: float = 10.0
    budget: float | None = None
    at_least: int = 3
    at_most: int = 20

    def calls(self, seconds_per_call: float) -> int:
        """Return how often to time a call that takes so long."""
        if self.repeats is not None:
            return self.repeats
        fit = int(self.seconds / max(seconds_per_call, 1e-9))
        return min(max(fit, self.at_least), self.at_most)


def warm_up(workload: Workload, mode: Mode, clock: Clock, forecast: float | None) -> float:
    """Call a workload until it is warm.

    A call of more than a second is warmed up on a corner of its input: the overhead of an
    operator's first call is then a small part of the time measured.

    Args:
        workload: what to call.
        mode: "inference" or "training".
        clock: of its device.
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
        workload.prepare(mode)
        seconds = clock.milliseconds(lambda: workload.run(mode)) / 1e3
        if seconds > 1.0:
            break
    workload.prepare(mode)
    return seconds


def interleave(
    workloads: Mapping[Key, Workload],
    calls: Mapping[Key, int],
    mode: Mode,
    clock: Clock,
    *,
    step: Callable[[Key], object] = lambda key: None,
    enough: Callable[[list[float]], bool] = lambda times: False,
) -> tuple[dict[Key, list[float]], dict[Key, Failure]]:
    """Time all workloads round by round.

    There are as many rounds as the largest number of calls; a workload with fewer calls is called
    in rounds spread evenly over them.

    Args:
        workloads: by key.
        calls: how often each is timed.
        mode: "inference" or "training".
        clock: of their device.
        step: called with the key after every call.
        enough: called with a workload's times; whether to time it no more.

    Returns:
        Milliseconds of each call in the order they were made, and the workloads that failed;
        every key is in exactly one of the two.
    """
    times: dict[Key, list[float]] = {key: [] for key in workloads}
    failures: dict[Key, Failure] = {}
    rounds = max((calls[key] for key in workloads), default=0)
    for turn in range(rounds):
        for key, workload in workloads.items():
            due = math.floor((turn + 1) * calls[key] / rounds) - math.floor(
                turn * calls[key] / rounds
            )
            if not due or key in failures or (times[key] and enough(times[key])):
                continue
            try:
                workload.prepare(mode)
                times[key].append(clock.milliseconds(lambda w=workload: w.run(mode)))  # type: ignore[misc]
            except Exception as error:
                failures[key] = Failure.of(error)
                del times[key]
            workload.prepare(mode)
            step(key)
    return times, failures
