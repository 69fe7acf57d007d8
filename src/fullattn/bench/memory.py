"""Peak memory of a call over its inputs: a fresh process on the CPU, the allocator on CUDA.

On the CPU every call runs in a process of its own, forked from one that has imported PyTorch and
has run no operator: importing is paid for once, and nothing of one call stays in memory for the
next. The process builds the module and its inputs, warms up at a small size (library code, BLAS
buffers and thread stacks are then resident), resets the peak and makes one call at the full size.
The figure is the peak minus what was resident before the call.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fullattn._cli.conditions import Mode, available_bytes
from fullattn._cli.loading import layer_sources, load_class
from fullattn.bench.results import Failure
from fullattn.bench.workload import Recipe, Workload
from fullattn.layers import register

__all__ = ["Probe", "cpu_peak", "cuda_peak", "start"]

_STATUS = Path("/proc/self/status")
_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
_AVAILABLE = "forkserver" in multiprocessing.get_all_start_methods()


@dataclass(frozen=True)
class Probe:
    """One measured call.

    Attributes:
        peak_bytes: peak memory over what was there before the call.
        seconds: how long this first call took; a forecast for those that are timed.
    """

    peak_bytes: int
    seconds: float


def start() -> None:
    """Start the process that others are forked from, which imports PyTorch meanwhile."""
    if not _AVAILABLE:
        return
    forkserver.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # which would unblock the signal
    # Inherited: Ctrl-C ends the caller, which ends the others.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    threshold = os.environ.get(_THRESHOLD)
    # Freed tensors go back to the system at once, so that every call's peak is its own.
    os.environ[_THRESHOLD] = "65536"
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threshold is None:
            del os.environ[_THRESHOLD]
        else:
            os.environ[_THRESHOLD] = threshold


def cpu_peak(recipe: Recipe, mode: Mode, limit: float) -> Probe | Failure | None:
    """Measure one call on the CPU in a process of its own.

    Args:
        recipe: builds what is called.
        mode: "inference" or "training".
        limit: seconds after which the call is given up.

    Returns:
        What was measured, or why nothing was; None where the system cannot fork.
    """
    if not _AVAILABLE:
        return None
    start()
    context = multiprocessing.get_context("forkserver")
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure, args=(theirs, layer_sources(), recipe, mode), daemon=True
    )
    try:
        process.start()
    except (EOFError, OSError):
        return Failure("failed", "the process that measures memory ended unexpectedly")
    theirs.close()
    try:
        answer = answers.recv()
        if answer is None:  # the call begins
            if not answers.poll(limit):
                return Failure.too_slow(limit)
            answer = answers.recv()
    except EOFError:
        process.join()
        return _ended(process.exitcode or 0)
    finally:
        process.kill()
        process.join()
        answers.close()
    found: Probe | Failure = answer
    return found


def _ended(status: int) -> Failure:
    if status == -signal.SIGKILL:
        return Failure("out of memory", "the system ended the process, as it does without memory")
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return Failure("failed", f"the process that measured it ended with {name}")


def cuda_peak(workload: Workload, mode: Mode) -> int:
    """Return the peak bytes of one call on CUDA over what was allocated before."""
    device = workload.x.device
    workload.prepare(mode)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    workload.run(mode)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# In the measuring process


def _measure(answers: Connection, sources: list[str], recipe: Recipe, mode: Mode) -> None:
    """Send None when the call begins, then what was measured."""
    silence = os.open(os.devnull, os.O_WRONLY)  # what a module prints, and a crash
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        for source in sources:
            layer: Any = load_class(source, "layer")
            register(layer)
        torch.set_num_threads(recipe.conditions.threads)
        _limit_memory()
        workload = recipe.workload(mode)
        workload.warm_up_small(mode)
        workload.prepare(mode)
        peak = _Peak()
        answers.send(None)
        began = time.perf_counter()
        workload.run(mode)
        seconds = time.perf_counter() - began
        answers.send(Probe(peak.bytes(), seconds))
    except (Exception, SystemExit) as error:
        answers.send(Failure.of(error))


def _status(field: str) -> int:
    """Read a field of /proc/self/status in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {_STATUS}")


class _Peak:
    """Peak of resident memory since it was made."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before, self._resettable = _status("VmRSS"), True
        except OSError:
            # The peak of the process's whole life; it has only built the inputs so far.
            self._before, self._resettable = self._lifetime(), False

    def bytes(self) -> int:
        peak = _status("VmHWM") if self._resettable else self._lifetime()
        return max(0, peak - self._before)

    def _lifetime(self) -> int:
        import resource  # POSIX only, as is this process

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _limit_memory() -> None:
    """Let an allocation that does not fit raise, where the system would kill a process for it."""
    import resource

    free = available_bytes()
    if free is None:
        return
    with contextlib.suppress(OSError, ValueError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if one must go, this one
        limit = _status("VmData") + int(free * 0.95)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
