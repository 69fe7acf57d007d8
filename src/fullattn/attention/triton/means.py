"""The means of a feature map over W and over H, in one launch on a GPU.

PyTorch's reductions read a map in channels_last at a tenth of the memory bandwidth, and their
gradients read or write a whole map five times: together a third of the layer's time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fullattn.attention.triton.launch import Launch, on_device_of

__all__ = ["AxialMeans"]

_BLOCK_C, _BLOCK = 128, 32
_TILE_P, _TILE_C = 64, 64


class AxialMeans(torch.autograd.Function):
    """Return the map, (B, H, C) and (B, W, C) for a map (B, C, H, W) in channels_last.

    The gradient of the returned map is added to that of the means in the same pass.
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
    def backward(ctx: Any, grad: Tensor, grad_column: Tensor, grad_row: Tensor) -> Tensor:
        """Add the gradients of the map and of both means."""
        if torch.is_grad_enabled():  # this gradient will be differentiated
            columns = grad_column.transpose(1, 2).unsqueeze(3) / ctx.shape[3]
            rows = grad_row.transpose(1, 2).unsqueeze(2) / ctx.shape[2]
            return torch.add(grad + columns, rows)
        from fullattn.attention.triton import tuning

        batch, channels, height, width = ctx.shape
        grad = grad.contiguous(memory_format=torch.channels_last)
        out = torch.empty_like(grad)
        arguments: dict[str, Any] = {"grad": grad, "out": out}
        arguments |= {"grad_column": grad_column.contiguous(), "grad_row": grad_row.contiguous()}
        arguments |= {"C": channels, "H": height, "W": width}
        # The strides of a contiguous map; an axis of length 1 may have any stride.
        arguments |= {"b": channels * height * width, "p": channels}
        constants = {"TILE_P": _TILE_P, "TILE_C": _TILE_C}
        programs = batch * -(-height * width // _TILE_P) * -(-channels // _TILE_C)
        with on_device_of(out):
            tuning.run(Launch("spread", {}, arguments, constants, lambda own: programs))
        return out
