"""The named configurations of the kernels, and which of them a problem may be tuned over.

`most_features` is measured, not guessed: up to there ptxas of Triton 3.6 and 3.7 keeps everything
in registers, in either layout. `tests/test_triton_compile.py` compiles and looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CLASSES",
    "CONFIGURATIONS",
    "MOST_FEATURES",
    "Configuration",
    "candidates",
    "features_class",
    "power_of_two",
]

# A choice made for one number of features serves all of its class.
CLASSES = (16, 32, 64, 96, 128, 192, 256, 384, 512)
MOST_FEATURES = CLASSES[-1]


def features_class(features: int) -> int:
    """The class of a number of features: the smallest of `CLASSES` that is not below it.

    Example:
        >>> features_class(97), features_class(128)
        (128, 128)
    """
    return next(most for most in CLASSES if features <= most)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number.

    Example:
        >>> power_of_two(512), power_of_two(513)
        (512, 1024)
    """
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Configuration:
    """How a kernel is cut and compiled.

    Attributes:
        name: what messages and results call it.
        own: tokens whose results one program makes.
        others: tokens that they meet at a time.
        warps: warps of a program.
        stages: depth of the software pipeline.
        exact: cover the features by up to three powers of two; otherwise by one.
    """

    name: str
    own: int
    others: int
    warps: int
    stages: int
    exact: bool = True

    @property
    def constants(self) -> dict[str, int | bool]:
        """The kernel's compile-time constants that this decides."""
        return {"OWN": self.own, "OTHERS": self.others, "EXACT": self.exact}

    @property
    def options(self) -> dict[str, int]:
        """Triton's options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


CONFIGURATIONS = {
    entry.name: entry
    for entry in (
        Configuration("wide", 128, 64, 8, 2),
        Configuration("wide_deep", 128, 64, 8, 3),
        Configuration("wide_padded", 128, 64, 8, 2, exact=False),
        Configuration("square", 64, 64, 4, 3),
        Configuration("flat", 128, 32, 8, 2),
        Configuration("slim", 64, 32, 4, 2),
        Configuration("slim_padded", 64, 32, 4, 2, exact=False),
        Configuration("slim_shared", 64, 32, 8, 2),
        Configuration("slim_shared_padded", 64, 32, 8, 2, exact=False),
        Configuration("small", 32, 32, 4, 2),
        Configuration("tiny", 32, 16, 4, 1),
        Configuration("long", 64, 16, 8, 1),
        Configuration("thread", 16, 16, 4, 1),
    )
}


def candidates(
    kernel: str,
    *,
    features: int,
    channels: int,
    number_bytes: int,
    tensor_cores: bool,
    hopper: bool,
) -> list[Configuration]:
    """temporary"""
    return [CONFIGURATIONS["thread"]]
