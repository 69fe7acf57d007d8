"""The process that measures peak memory on the CPU: `python -m fullattn.bench.memory_probe`.

Reads one job a line (JSON) and answers each with one line. Every job runs in a fresh process,
forked before any operator has run here, so that importing PyTorch is paid for once and nothing of
one row is left in memory for the next.

Within a job: build the module and its inputs, warm up at a small size (library code, BLAS buffers
and thread stacks are then resident), reset the peak, make one call at the full size. The figure is
the peak minus what was resident before the call.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fullattn._cli.conditions import Conditions, Mode, available_bytes
from fullattn._cli.loading import load_class
from fullattn._cli.shapes import Shape
from fullattn.bench.failures import Failure
from fullattn.bench.implementations import Contender
from fullattn.bench.workload import Workload
from fullattn.layers import register
from fullattn.swap.network import Network

__all__ = ["main"]

_STATUS = Path("/proc/self/status")


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
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
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _refuse_more_than_there_is() -> None:
    """Let an allocation that does not fit raise, where the system would kill a process for it."""
    free = available_bytes()
    if free is None:
        return
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")  # if one must go, this one
        limit = _status("VmData") + int(free * 0.95)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    except (OSError, ValueError):
        return  # then the system decides


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in this process; returns peak bytes and seconds, or the failure."""
    mode: Mode = job["mode"]
    try:
        workload = _workload(job, mode)
        _warm_up(workload.smaller(), mode)
        workload.prepare(mode)
        peak = _Peak()
        peak.start()
        # Ends the process with SIGALRM, in the middle of an operator if need be.
        signal.setitimer(signal.ITIMER_REAL, job["limit"])
        start = time.perf_counter()
        workload.run(mode)
        seconds = time.perf_counter() - start
        return {"peak_bytes": peak.stop(), "seconds": seconds}
    except (Exception, SystemExit) as error:
        failure = Failure.of(error)
        return {"failure": [failure.kind, failure.reason]}


def _workload(job: dict[str, Any], mode: Mode) -> Workload:
    for source in job["layers"]:
        layer: Any = load_class(source, "layer")
        register(layer)
    if "network" in job:
        network = Network.of(job["network"])
        conditions = network.conditions
    else:
        conditions = Conditions(**job["conditions"])
    torch.set_num_threads(conditions.threads)
    _refuse_more_than_there_is()
    if "network" in job:
        return network.workload()
    return Workload.of(Contender(**job["contender"]), Shape(*job["shape"]), conditions, mode)


def _warm_up(small: Workload, mode: Mode) -> None:
    small.prepare(mode)
    try:
        small.run(mode)
    except Exception:
        # A module may be made for large maps alone; the call that counts will tell.
        return
    finally:
        small.module.zero_grad(set_to_none=True)


def _answer_of(child: int, job: dict[str, Any], reader: int) -> str:
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer:
        return answer
    if status == -signal.SIGALRM:
        failure = Failure.too_slow(None, job["limit"])
    elif status == -signal.SIGKILL:
        failure = Failure(
            "out of memory", "the system ended the process, as it does without memory"
        )
    else:
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        failure = Failure("failed", f"the process that measured it ended with {name}")
    return json.dumps({"failure": [failure.kind, failure.reason]})


def main() -> None:
    """Answer jobs until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # What a contender prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                os.write(writer, json.dumps(measure(job)).encode())
            finally:
                os._exit(0)  # never back into this loop
        os.close(writer)
        answers.write(_answer_of(child, job, reader) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
