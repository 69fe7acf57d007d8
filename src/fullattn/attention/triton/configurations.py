"""The named configurations of the kernels, and which of them a problem may be tuned over.

Which configurations stand in `_CHOICES` is by compiling, not by timing: at the common shapes that
`tests/test_triton_compile.py` looks at, the assemblers of Triton 3.6 and 3.7 keep everything in
registers with them. At some others (float32 beyond 128 features, unaligned slices beyond 128) a few
bytes go to the stack. Their order is a guess that no GPU has judged yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "AMPERE",
    "CLASSES",
    "CONFIGURATIONS",
    "HOPPER",
    "MOST_FEATURES",
    "Configuration",
    "candidates",
    "features_class",
    "power_of_two",
]

HOPPER, AMPERE = "Hopper", "Ampere"
# A choice made for one number of features serves all of its class.
CLASSES = (16, 32, 64, 80, 96, 112, 128, 192, 256, 512)
MOST_FEATURES = CLASSES[-1]


def features_class(features: int) -> int:
    """The class of a number of features: the smallest of `CLASSES` that is not below it.

    Example:
        >>> features_class(97), features_class(129)
        (112, 192)
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
        Configuration("flat_padded", 128, 32, 8, 2, exact=False),
        Configuration("slim", 64, 32, 4, 2),
        Configuration("slim_padded", 64, 32, 4, 2, exact=False),
        Configuration("slim_shared", 64, 32, 8, 2),
        Configuration("slim_shared_padded", 64, 32, 8, 2, exact=False),
        Configuration("small", 32, 32, 4, 2),
        Configuration("small_deep", 32, 32, 4, 3),
        Configuration("small_shared", 32, 32, 8, 2),
        Configuration("small_shared_padded", 32, 32, 8, 2, exact=False),
        Configuration("tiny", 32, 16, 4, 1),
        Configuration("tiny_padded", 32, 16, 4, 1, exact=False),
        Configuration("tiny_shared", 32, 16, 8, 1),
        Configuration("long", 64, 16, 8, 1),
        Configuration("least_shared_padded", 16, 16, 8, 1, exact=False),
    )
}

# By kind of product and kernel: up to how many features which configurations, the best guess first
# (it runs where nothing may be tuned).
_Choices = Mapping[str, tuple[tuple[int, tuple[str, ...]], ...]]
_CHOICES: Mapping[tuple[str, str], _Choices] = {
    ("half", HOPPER): {
        "forward": (
            (96, ("wide", "wide_deep", "square", "slim")),
            (128, ("wide", "wide_deep", "wide_padded", "square")),
            (256, ("slim_shared", "long")),
            (512, ("least_shared_padded",)),
        ),
        "backward_queries": (
            (128, ("wide", "square", "flat")),
            (256, ("slim_shared", "long")),
            (512, ("least_shared_padded",)),
        ),
        "backward_keys": (
            (64, ("square", "flat", "slim_shared")),
            (96, ("flat", "slim_shared")),
            (128, ("slim_shared", "slim_shared_padded", "flat_padded")),
            (192, ("long",)),
            (512, ("least_shared_padded",)),
        ),
    },
    ("half", AMPERE): {
        "forward": (
            (64, ("wide", "square", "slim")),
            (128, ("flat", "slim_shared")),
            (256, ("long",)),
            (512, ("least_shared_padded",)),
        ),
        "backward_queries": (
            (64, ("wide", "flat", "slim")),
            (96, ("flat", "slim", "slim_shared")),
            (128, ("slim_shared", "small")),
            (256, ("long",)),
            (512, ("least_shared_padded",)),
        ),
        "backward_keys": (
            (64, ("flat", "slim", "slim_shared")),
            (96, ("slim_shared",)),
            (128, ("slim_shared_padded", "slim_padded")),
            (256, ("slim_shared_padded",)),
            (512, ("least_shared_padded",)),
        ),
    },
    ("tf32", HOPPER): {
        "forward": ((128, ("slim_shared", "long")), (512, ("least_shared_padded",))),
        "backward_queries": ((128, ("slim_shared", "long")), (512, ("least_shared_padded",))),
        "backward_keys": ((128, ("long",)), (512, ("least_shared_padded",))),
    },
    ("tf32", AMPERE): {
        "forward": ((128, ("slim_shared",)), (512, ("least_shared_padded",))),
        "backward_queries": ((128, ("long", "tiny")), (512, ("least_shared_padded",))),
        "backward_keys": ((128, ("tiny_padded",)), (512, ("least_shared_padded",))),
    },
    ("ieee", HOPPER): {
        "forward": (
            (80, ("small", "small_shared")),
            (112, ("small", "tiny_shared")),
            (128, ("small_shared", "tiny_shared")),
            (512, ("least_shared_padded",)),
        ),
        "backward_queries": (
            (64, ("small_shared", "tiny_shared")),
            (112, ("slim_shared", "tiny_shared")),
            (128, ("small_deep",)),
            (512, ("least_shared_padded",)),
        ),
        "backward_keys": (
            (64, ("small", "tiny")),
            (80, ("small_shared", "tiny_shared")),
            (112, ("tiny_shared", "tiny")),
            (128, ("small_shared", "tiny_shared")),
            (512, ("least_shared_padded",)),
        ),
    },
    ("ieee", AMPERE): {
        "forward": (
            (64, ("small", "small_shared")),
            (128, ("small_shared", "tiny_shared")),
            (512, ("least_shared_padded",)),
        ),
        "backward_queries": (
            (64, ("small_shared", "tiny_shared")),
            (96, ("slim_shared", "tiny_shared")),
            (112, ("small_shared", "tiny_shared")),
            (128, ("small",)),
            (512, ("least_shared_padded",)),
        ),
        "backward_keys": (
            (64, ("small", "tiny")),
            (80, ("small_shared",)),
            (112, ("tiny_shared", "tiny")),
            (128, ("small_shared", "small_shared_padded")),
            (512, ("least_shared_padded",)),
        ),
    },
}


def candidates(
    kernel: str,
    *,
    features: int,
    channels: int,
    number_bytes: int,
    precision: str,
    generation: str,
) -> list[Configuration]:
    """The configurations that a problem is tuned over.

    Args:
        kernel: name of the kernel.
        features: class of the number of features.
        channels: number of channels, as a power of two.
        number_bytes: bytes of a number of the feature map.
        precision: of float32 products, "ieee" or "tf32".
        generation: of the card, `HOPPER` (compute capability 9.0 or newer) or `AMPERE`.

    Returns:
        At least one, the best guess first.
    """
    kind = "half" if number_bytes == 2 else precision
    choices = _CHOICES[kind, generation][kernel]
    names = next(names for most, names in choices if features <= most)
    found = [CONFIGURATIONS[name] for name in names]
    fitting = [entry for entry in found if entry.own <= max(channels, 32)]
    return fitting or [CONFIGURATIONS["small" if features <= 128 else "least_shared_padded"]]
