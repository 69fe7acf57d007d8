"""Time, taken in turns: round by round every contender once, so that a drifting machine hurts all.

The clocks are the only part that knows a device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fullattn._cli.conditions import Mode
from fullattn.bench.failures import Failure
from fullattn.bench.workload import Workload

__all__ = ["Clock", "CpuClock", "CudaClock", "Plan", "clock_for", "take_turns", "warm_up"]


class Clock(Protocol):
    """How long a call takes on one kind of device."""

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
            # Event's stubs say nothing of its types.
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end))


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Plan:
    """How often a call is timed.

    Attributes:
        seconds: what one contender may take in all, for one shape and mode.
        repeats: exactly so many calls; None to fit them into `seconds`.
        limit: seconds that one call may take at most; a contender that has spent as much on calls
            is timed no more.
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
        """How often to time a call that takes so long."""
        if self.repeats is not None:
            return self.repeats
        fit = int(self.seconds / max(seconds_per_call, 1e-9))
        return min(max(fit, self.at_least), self.at_most)


def warm_up(workload: Workload, mode: Mode, clock: Clock, forecast: float | None) -> float:
    """Call a workload until it is warm.

    A call of more than a second is warmed up on a corner of its input: what the first call of an
    operator pays for is then a small part of it.

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
        small = workload.smaller()
        small.prepare(mode)
        try:
            small.run(mode)
        except Exception:
            return forecast  # made for large maps alone
        return forecast
    # The first call on CUDA may compile or choose kernels; the second is like those that follow.
    for _ in range(2):
        workload.prepare(mode)
        seconds = clock.milliseconds(lambda: workload.run(mode)) / 1e3
        if seconds > 1.0:
            break
    workload.prepare(mode)
    return seconds


def take_turns(
    workloads: Mapping[str, Workload],
    calls: Mapping[str, int],
    mode: Mode,
    clock: Clock,
    *,
    step: Callable[[str], object] = lambda name: None,
    enough: Callable[[list[float]], bool] = lambda times: False,
) -> tuple[dict[str, list[float]], dict[str, Failure]]:
    """Time all contenders, round by round.

    There are as many rounds as the largest number of calls; a contender with fewer takes part in
    rounds spread evenly over them.

    Args:
        workloads: by contender's name.
        calls: how often each is timed.
        mode: "inference" or "training".
        clock: of their device.
        step: told after every call whose it was.
        enough: told a contender's times after its first call, says whether to time it no more.

    Returns:
        Milliseconds of each call in the order they were made, and the contenders that failed;
        every contender is in exactly one of the two.
    """
    times: dict[str, list[float]] = {name: [] for name in workloads}
    failures: dict[str, Failure] = {}
    rounds = max((calls[name] for name in workloads), default=0)
    for turn in range(rounds):
        for name, workload in workloads.items():
            if name in failures or not _takes_part(turn, rounds, calls[name]):
                continue
            if times[name] and enough(times[name]):
                continue
            try:
                workload.prepare(mode)
                times[name].append(clock.milliseconds(lambda w=workload: w.run(mode)))  # type: ignore[misc]
            except Exception as error:
                failures[name] = Failure.of(error)
                del times[name]
            workload.prepare(mode)
            step(name)
    return times, failures


def _takes_part(turn: int, rounds: int, calls: int) -> bool:
    return math.floor((turn + 1) * calls / rounds) > math.floor(turn * calls / rounds)
