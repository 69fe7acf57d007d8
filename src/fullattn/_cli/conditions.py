"""The conditions under which everything of one run is measured."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import einops
import torch
from torch import Tensor, nn

from fullattn._cli.errors import UsageError, describe
from fullattn._version import __version__

__all__ = [
    "MEMORY_FORMATS",
    "MODES",
    "Conditions",
    "Environment",
    "Mode",
    "available_bytes",
    "conditions_of",
    "device_name",
    "environment",
    "modes_named",
    "parse_device",
]

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


Mode = Literal["inference", "training"]
MODES: tuple[Mode, ...] = ("inference", "training")


@dataclass(frozen=True)
class Conditions:
    """The conditions that all implementations of a run share; plain data.

    Attributes:
        device: such as "cpu" or "cuda:0".
        dtype: name of a floating-point dtype of PyTorch.
        memory_format: a name of `MEMORY_FORMATS`.
        project: whether layers that have a projection and the official implementation end with it.
        threads: PyTorch's threads within an operator.
        seed: of the parameters and the inputs.
        image: path of the photograph that the inputs are made from; None for normal noise.
        gamma: value of every layer's gamma, so that attention is not multiplied by 0.
    """

    device: str = "cpu"
    dtype: str = "float32"
    memory_format: str = "contiguous"
    project: bool = False
    threads: int = 1
    seed: int = 0
    image: str | None = None
    gamma: float = 0.5

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def device_type(self) -> str:
        """The device without its index, such as "cpu", "cuda" or "mps"."""
        return torch.device(self.device).type

    def placed(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, dtype and memory format."""
        module = module.to(device=self.device, dtype=self.torch_dtype)
        if self.memory_format == "channels_last":
            # nn.Module.to takes it only by this name; the type stubs do not list it.
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def placed_tensor(self, x: Tensor) -> Tensor:
        """Move a tensor to the device, dtype and memory format."""
        x = x.to(device=self.device, dtype=self.torch_dtype)
        return x.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])

    @contextmanager
    def limited_threads(self) -> Iterator[None]:
        """Set PyTorch's number of threads for the block."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @property
    def input_kind(self) -> str:
        """The inputs in a few words."""
        if self.image is None:
            return f"normal noise (seed {self.seed})"
        return f"image {Path(self.image).name} through a random stem (seed {self.seed})"


@dataclass(frozen=True)
class Environment:
    """Where and when a run was made.

    Attributes:
        date: when it began.
        device_name: of the GPU, or model of the CPU.
        platform: operating system and architecture.
        python: version; likewise torch, einops and fullattn.
        load: load average of the last minute before it began; None where the system has none.
    """

    date: str
    device_name: str
    platform: str
    python: str
    torch: str
    einops: str
    fullattn: str
    load: float | None = None


def environment(device: torch.device) -> Environment:
    """Describe this machine, with the device that is measured."""
    return Environment(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        device_name=device_name(device),
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        einops=einops.__version__,
        fullattn=__version__,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def device_name(device: torch.device) -> str:
    """Name of a GPU, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def available_bytes() -> int | None:
    """Memory that programs may still take on this machine; None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def parse_device(text: str) -> torch.device:
    """Read a device such as "cuda:1"; raise UsageError unless it can be used on this machine."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UsageError(f"expected a device such as cpu or cuda:0, got {text!r}") from error
    if device.type == "meta":
        raise UsageError("expected a device that computes, got 'meta'")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise UsageError(f"expected a device of this machine, got {text!r}: CUDA sees {count}")
    try:
        torch.empty(1, device=device)
    except Exception as error:  # each device has its own
        reason = describe(error).partition(". ")[0]  # PyTorch goes on with a list of backends
        raise UsageError(f"device {text!r} cannot be used: {reason}") from error
    return device


def conditions_of(args: argparse.Namespace) -> Conditions:
    """Read the options of `add_conditions` and `add_inputs`."""
    parse_device(args.device)
    return Conditions(
        device=args.device,
        dtype=args.dtype,
        memory_format=args.memory_format,
        project=args.project,
        threads=args.threads or torch.get_num_threads(),
        seed=args.seed,
        image=args.image,
    )


def modes_named(chosen: str | None) -> tuple[Mode, ...]:
    """Return the mode of that name, or both for None and "both"."""
    return tuple(mode for mode in MODES if mode == chosen) or MODES
