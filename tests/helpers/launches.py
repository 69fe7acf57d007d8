"""The launches of the Triton kernels, recorded and not made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fullattn.attention.triton import launch

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
SHAPES = [
    (8, 512, 96, 96),
    (8, 512, 97, 97),
    (1, 512, 128, 256),
    (2, 2048, 64, 64),
    (16, 128, 64, 64),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
InputsOrNone = tuple[Tensor, Tensor, Tensor, Tensor | None]


def inputs_of(x: Tensor) -> Inputs:
    """x, keys in the layout in which the layer's Linear leaves them, and gamma."""
    batch, channels, height, width = x.shape
    column_key = x.new_empty(batch, height, channels).mT
    row_key = x.new_empty(batch, width, channels).mT
    return x, column_key, row_key, x.new_empty(1)


def map_of(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    memory_format: torch.memory_format = CHANNELS_LAST,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def launches_of(
    inputs: InputsOrNone, keep: bool = True, precision: str = "ieee", scale: float = 1.0
) -> tuple[list[launch.Launch], list[launch.Launch]]:
    """Every launch of a forward and of a backward."""
    forward: list[launch.Launch] = []
    backward: list[launch.Launch] = []
    y, *found = launch.forward(*inputs, scale, keep, precision, forward.append)
    kept: list[Any] = found
    launch.backward(y, *inputs, *kept, scale, precision, backward.append)
    return forward, backward
