"""The means of a feature map over its rows and over its columns, in one launch on a GPU.

PyTorch's own reductions read a map in channels_last at a tenth of the memory's speed, and their
gradients go through a whole map five times: beside the attention kernels, a third of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fullattn.attention.triton.launch import Launch, on_device_of

__all__ = ["AxialMeans"]

_BLOCK_C, _BLOCK = 128, 32
_TILE_P, _TILE_C = 64, 64


class AxialMeans(torch.autograd.Function):
    """The map itself, (B, H, C) and (B, W, C) from a map (B, C, H, W) in channels_last.

    It can be differentiated once. What uses the map that is returned, and not the one given, adds
    its gradient to that of the means in the same pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Average over W, and over H."""
        from fullattn.attention.triton import tuning

        batch, channels, height, width = ctx.shape = x.shape
        column = x.new_empty(batch, height, channels)
        row = x.new_empty(batch, width, channels)
        arguments = {"x": x, "column_mean": column, "row_mean": row, "B": batch, "C": channels}
        arguments |= {"H": height, "W": width}
        arguments |= {"x_b": x.stride(0), "x_h": x.stride(2), "x_w": x.stride(3)}
        constants = {"BLOCK_C": _BLOCK_C, "BLOCK": _BLOCK}
        programs = batch * (height + width) * -(-channels // _BLOCK_C)
        with on_device_of(x):
            tuning.run(Launch("means", {}, arguments, constants, lambda own: programs))
        return x.view_as(x), column, row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_column: Tensor, grad_row: Tensor) -> Tensor:
        """Spread both gradients over the map, and add that of the map."""
        from fullattn.attention.triton import tuning

        batch, channels, height, width = ctx.shape
        grad = grad.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(grad)
        arguments: dict[str, Any] = {"grad": grad, "out": out}
        arguments |= {"grad_column": grad_column.contiguous(), "grad_row": grad_row.contiguous()}
        arguments |= {"C": channels, "H": height, "W": width}
        # As of a contiguous map; an axis of length 1 may have any stride.
        arguments |= {"b": channels * height * width, "p": channels}
        constants = {"TILE_P": _TILE_P, "TILE_C": _TILE_C}
        programs = batch * -(-height * width // _TILE_P) * -(-channels // _TILE_C)
        with on_device_of(out):
            tuning.run(Launch("spread", {}, arguments, constants, lambda own: programs))
        return out
