"""Peak memory of a call over its inputs: a fresh process on the CPU, the allocator on CUDA."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from fullattn._cli.conditions import Conditions, Mode
from fullattn._cli.loading import layer_sources
from fullattn._cli.shapes import Shape
from fullattn.bench.failures import Failure
from fullattn.bench.implementations import Contender
from fullattn.bench.workload import Workload
from fullattn.swap.network import Network

__all__ = ["CpuMemory", "Probe", "cuda_peak"]


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
    """A running `memory_probe`, to be used in a `with` block, which ends it in any case."""

    available = hasattr(os, "fork")

    def __enter__(self) -> CpuMemory:
        """Start the process; it imports PyTorch while the caller goes on."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fullattn.bench.memory_probe"],
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

    def probe(
        self,
        contender: Contender,
        shape: Shape,
        conditions: Conditions,
        mode: Mode,
        limit: float,
    ) -> Probe | Failure:
        """Measure one call.

        Args:
            contender: what to call.
            shape: of its input.
            conditions: of the run.
            mode: "inference" or "training".
            limit: seconds after which the call is given up.

        Returns:
            What was measured, or why nothing was.
        """
        job = {
            "layers": layer_sources(),
            "contender": dataclasses.asdict(contender),
            "shape": shape,
            "conditions": dataclasses.asdict(conditions),
            "mode": mode,
            "limit": limit,
        }
        return self._ask(job)

    def probe_network(self, network: Network, mode: Mode, limit: float) -> Probe | Failure:
        """Measure one call of a whole network; arguments and result as of `probe`."""
        job = {"layers": layer_sources(), "network": dataclasses.asdict(network)}
        return self._ask({**job, "mode": mode, "limit": limit})

    def _ask(self, job: dict[str, Any]) -> Probe | Failure:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return Failure("failed", "the process that measures memory ended unexpectedly")
        answer = json.loads(line)
        if "failure" in answer:
            return Failure(*answer["failure"])
        return Probe(**answer)


def cuda_peak(workload: Workload, mode: Mode) -> int:
    """Peak bytes of one call on CUDA over what was allocated before, by PyTorch's allocator."""
    device = workload.x.device
    workload.prepare(mode)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    workload.run(mode)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
