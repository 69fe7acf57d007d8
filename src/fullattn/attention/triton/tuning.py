"""Launch a kernel with the first configuration that fits the card.

The order of the configurations is fixed (see `configurations`), and nothing is timed in a user's
process: the first call does not wait for a tuner, and two runs on one card are bitwise equal.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from fullattn.attention.triton import kernels
from fullattn.attention.triton.configurations import (
    AMPERE,
    HOPPER,
    Configuration,
    candidates,
    power_of_two,
)
from fullattn.attention.triton.launch import Launch

__all__ = ["INTERPRETED", "allowed", "launch", "named_arguments", "run"]

INTERPRETED = not isinstance(kernels.forward, JITFunction)


@functools.cache
def _generation(device: torch.device) -> str:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return HOPPER if hopper else AMPERE


def allowed(each: Launch) -> tuple[Configuration, ...]:
    """Return the configurations for a launch, the best first."""
    x = each.slices["x"]
    return candidates(
        each.kernel,
        features=x.shape[2],
        channels=power_of_two(x.shape[3]),
        element_size=x.element_size(),
        precision=each.constants["PRECISION"],
        generation=_generation(x.device),
    )


def descriptors(slices: Tensor, tokens: int, widths: tuple[int, ...]) -> tuple[Any, Any]:
    """Make tensor descriptors of slices (B, S, D, C), for boxes of the first and the last width.

    Args:
        slices: the slices.
        tokens: tokens of a box.
        widths: widths of the boxes that cover the features.

    Returns:
        Two descriptors; None in place of the second if all boxes have one width.
    """
    shape, unit = slices.shape, 16 // slices.element_size()
    # An axis of length 1 may have any stride, and a descriptor takes multiples of 16 bytes.
    strides = [
        unit if size == 1 else stride for size, stride in zip(shape, slices.stride(), strict=True)
    ]
    strides[-1] = 1
    found = []
    for width in dict.fromkeys((widths[0], widths[-1])):
        # Without the constructor, whose checks are slow and hold by construction.
        made = TensorDescriptor.__new__(TensorDescriptor)
        made.base, made.shape, made.strides = slices, shape, strides
        made.block_shape, made.padding = [1, 1, width, tokens], "zero"
        found.append(made)
    return found[0], found[1] if len(found) > 1 else None


def named_arguments(each: Launch, entry: Configuration) -> dict[str, Any]:
    """Return all arguments of a kernel in a configuration, without Triton's launch options."""
    tokens, features = each.slices["x"].shape[:1:-1]
    constants = entry.constants(tokens, features)
    widths = kernels.widths(constants["FEATURES"], entry.box)
    named = each.arguments | each.constants | constants
    for name, slices in each.slices.items():
        block = entry.block_m if name.endswith("_own") else entry.block_n
        named[name], named[f"{name}_rest"] = descriptors(slices, block, widths)
    return named


# Compiled kernels by all properties that Triton specialises on. Triton's own lookup takes as long
# as the GPU does for a small map.
_compiled: dict[tuple[Any, ...], Any] = {}


def _kind(value: Any) -> Any:
    """Return the properties of an argument that Triton specialises a kernel for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value >= 2**31
    return None if value is None else type(value)


def launch(each: Launch, entry: Configuration | None = None) -> None:
    """Launch a kernel; the attention kernels in a configuration."""
    kernel = getattr(kernels, each.kernel)
    named: dict[str, Any] = each.arguments | each.constants
    options: dict[str, int] = {}
    programs = (each.programs(1 if entry is None else entry.block_m), 1, 1)
    if entry is not None:
        named, options = named_arguments(each, entry), entry.options
    if INTERPRETED:
        kernel[programs](**named, **options)
        return
    key = (
        each.kernel, entry, named.get("FEATURES"), named.get("DIVIDES"), *each.constants.values(),
        *(slices.dtype for slices in each.slices.values()), *map(_kind, each.arguments.values()),
        torch.cuda.current_device(),
    )  # fmt: skip
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[programs](**named, **options)
    else:
        compiled[programs](*(named[name] for name in kernel.arg_names))


def run(each: Launch) -> None:
    """Launch a kernel in the first configuration that fits.

    Raises:
        TritonError: the kernel does not compile, or no configuration fits the card.
    """
    entries: tuple[Configuration | None, ...] = allowed(each) if each.slices else (None,)
    for entry in entries:
        try:
            launch(each, entry)
            return
        except OutOfResources:
            if entry is entries[-1]:
                raise
