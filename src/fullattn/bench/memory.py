"""Peak memory of a call over its inputs: a fresh process on the CPU, the allocator on CUDA.

`python -m fullattn.bench.memory` is the process that measures on the CPU. It reads one job a line
and answers each with a line of JSON. Every job runs in a process of its own, forked before any
operator has run here: importing PyTorch is paid for once, and nothing of one row stays in memory
for the next. Within a job: build the module and its inputs, warm up at a small size (library code,
BLAS buffers and thread stacks are then resident), reset the peak, make one call at the full size.
The figure is the peak minus what was resident before the call.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fullattn._cli.conditions import Mode, available_bytes
from fullattn._cli.loading import layer_sources, load_class
from fullattn.bench.measure import Failure
from fullattn.bench.workload import Recipe, Workload
from fullattn.layers import register

__all__ = ["CpuMemory", "Probe", "cuda_peak"]

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Probe:
    """One measured call.

    Attributes:
        peak_bytes: peak memory over what was there before the call.
        seconds: how long this first call took; a forecast for those that are timed.
    """

    peak_bytes: int
    seconds: float


class CpuMemory:
    """The measuring process, to be used in a `with` block, which ends it in any case."""

    available = hasattr(os, "fork")

    def __enter__(self) -> CpuMemory:
        """Start the process; it imports PyTorch while the caller goes on."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fullattn.bench.memory"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that Ctrl-C reaches this process alone
            # Freed tensors go back to the system at once, so that every call's peak is its own.
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the process and the one that it may have forked."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def probe(self, recipe: Recipe, mode: Mode, limit: float) -> Probe | Failure:
        """Measure one call.

        Args:
            recipe: builds what is called.
            mode: "inference" or "training".
            limit: seconds after which the call is given up.

        Returns:
            What was measured, or why nothing was.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = base64.b64encode(pickle.dumps((layer_sources(), recipe, mode, limit))).decode()
        try:
            self._process.stdin.write(f"{job}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return Failure("failed", "the process that measures memory ended unexpectedly")
        answer = json.loads(line)
        return Failure(**answer) if "kind" in answer else Probe(**answer)


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


def _status(field: str) -> int:
    """Read a field of /proc/self/status in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {_STATUS}")


class _Peak:
    """Peak of resident memory from `start` on, in bytes."""

    def start(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before, self._resettable = _status("VmRSS"), True
        except OSError:
            # The peak of the process's whole life; it has only built the inputs so far.
            self._before, self._resettable = self._lifetime(), False

    def stop(self) -> int:
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


def _measured(job: tuple[list[str], Recipe, Mode, float]) -> Probe | Failure:
    """Run one job in this process."""
    sources, recipe, mode, limit = job
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
        peak.start()
        # Ends the process with SIGALRM, in the middle of an operator if need be.
        signal.setitimer(signal.ITIMER_REAL, limit)
        start = time.perf_counter()
        workload.run(mode)
        seconds = time.perf_counter() - start
        return Probe(peak.stop(), seconds)
    except (Exception, SystemExit) as error:
        return Failure.of(error)


def _answer_of(child: int, limit: float, reader: int) -> str:
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer:
        return answer
    if status == -signal.SIGALRM:
        failure = Failure.too_slow(None, limit)
    elif status == -signal.SIGKILL:
        failure = Failure(
            "out of memory", "the system ended the process, as it does without memory"
        )
    else:
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        failure = Failure("failed", f"the process that measured it ended with {name}")
    return json.dumps(asdict(failure))


def _main() -> None:
    """Answer jobs until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # What a module prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for line in sys.stdin:
        job = pickle.loads(base64.b64decode(line))  # from our own parent
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                os.write(writer, json.dumps(asdict(_measured(job))).encode())
            finally:
                os._exit(0)  # never back into this loop
        os.close(writer)
        answers.write(_answer_of(child, job[-1], reader) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
