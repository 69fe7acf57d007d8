"""Block sizes and compile options of the kernels, by GPU generation, dtype and features.

`configurations.json` lists the configurations, the best first; the first that fits the card runs.
For 64, 96, 97, 128 and 256 features in half precision on Hopper the order was measured on an H100,
in bfloat16, by `benchmarks/gpu_sweep.py`, whose `--take` writes it; 16, 32, 80 and 192 features
use the order of a neighbour. All others are ordered by register spills when compiled with Triton
3.6, fewest first. Some still spill: float16 and bfloat16 at 97 features on Ampere, TF32 at 97 on
Hopper.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

__all__ = [
    "AMPERE",
    "CLASSES",
    "HOPPER",
    "MOST_FEATURES",
    "Configuration",
    "candidates",
    "features_class",
    "power_of_two",
]

HOPPER, AMPERE = "Hopper", "Ampere"
# Upper bounds of the classes of features; one class has one list of configurations.
CLASSES = (16, 32, 64, 80, 96, 112, 128, 192, 256, 512)
MOST_FEATURES = CLASSES[-1]


def features_class(features: int) -> int:
    """Return the class of a number of features: the smallest of `CLASSES` not below it.

    Example:
        >>> features_class(97), features_class(129)
        (112, 192)
    """
    return next(most for most in CLASSES if features <= most)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not below a number.

    Example:
        >>> power_of_two(512), power_of_two(513)
        (512, 1024)
    """
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Configuration:
    """Block sizes and compile options of a kernel.

    Attributes:
        block_m: tokens whose results a program computes.
        block_n: tokens in one step of the program's inner loop.
        box: features of a box; a tile consists of such boxes and a narrower one for the rest.
        warps: warps of a program.
        stages: depth of the software pipeline.
        registers: maximum per thread, so that more programs run at once; None for 255.
    """

    block_m: int
    block_n: int
    box: int
    warps: int
    stages: int
    registers: int | None = None

    def constants(self, tokens: int, features: int) -> dict[str, int | bool]:
        """Return the kernel's compile-time constants."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BOX": self.box,
            "FEATURES": -(-features // 16) * 16,
            "DIVIDES": tokens % max(self.block_m, self.block_n) == 0,
        }

    @property
    def options(self) -> dict[str, int]:
        """Triton's options of a launch."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    def __str__(self) -> str:
        registers = "" if self.registers is None else f", {self.registers} registers"
        blocks = f"{self.block_m}x{self.block_n}x{self.box}"
        return f"{blocks}, {self.warps} warps, {self.stages} stages{registers}"


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("configurations.json").read_text()
    table: dict[str, Any] = json.loads(text)
    return table


@functools.cache
def candidates(
    kernel: str, *, features: int, channels: int, element_size: int, precision: str, generation: str
) -> tuple[Configuration, ...]:
    """Return the configurations for a launch, at least one, the best first.

    Args:
        kernel: name of the kernel.
        features: number of features.
        channels: number of channels, as a power of two.
        element_size: bytes of an element of the feature map.
        precision: of float32 products, "ieee" or "tf32".
        generation: of the card, `HOPPER` (compute capability 9.0 or newer) or `AMPERE`.
    """
    kind = "half" if element_size == 2 else precision
    choices = _table()[generation][kind][kernel]
    most = next(most for most in choices if features <= int(most))
    found = [Configuration(**each) for each in choices[most]]
    # No blocks larger than the channels; the dot product requires at least 16.
    largest = max(16, channels)
    fitting = [each for each in found if each.block_m <= largest]
    return tuple(fitting) or (_smaller(found[-1], largest),)


def _smaller(entry: Configuration, most: int) -> Configuration:
    blocks = {"block_m": min(entry.block_m, most), "block_n": min(entry.block_n, most)}
    return Configuration(**asdict(entry) | blocks)
