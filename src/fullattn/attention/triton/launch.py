"""Describe the launches of a forward and a backward pass, from tensors to kernel arguments.

    forward:   `forward` for the columns, then for the rows, which adds its result to the columns'
               and applies gamma and the residual.
    backward:  for the columns, then for the rows: `backward_queries` writes or adds one part of the
               gradient of x and stores δ, `backward_keys` adds the other part and stores partial
               sums of the key's gradient; `finish` adds these up.

The kernels support one layout, channels_last, with the channels of every position at a multiple of
16 bytes: a slice then consists of whole sectors of memory, whatever H and W are. A map of another
layout is transposed once, into a buffer, and the result is transposed back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fullattn.attention.sizes import Size, maximum, minimum
from fullattn.attention.triton.configurations import power_of_two
from fullattn.reshape import COLUMNS, ROWS

__all__ = [
    "KernelName",
    "Launch",
    "Run",
    "backward",
    "empty_result",
    "forward",
    "on_device_of",
    "parts",
    "workspace",
]

# Target number of programs of `backward_keys`: of 64 tokens, 2 per multiprocessor of an H100 run at
# once. Not read from the card, because the order of summation of a key's gradient depends on it.
_PROGRAMS = 264
_BLOCK = 1024  # elements of a program of `finish`
_TILE = 64  # edge of the tile of a program of `copy`
_LOG2_E = 1 / math.log(2)
# Used for a scale of 0, which gives every key the same weight; -inf · 0 would be NaN.
_LEAST_SCALE = 1e-37

_CUTS = (COLUMNS, ROWS)

KernelName = Literal[
    "forward", "backward_queries", "backward_keys", "finish", "copy", "means", "spread"
]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, without its configuration.

    Attributes:
        kernel: name of the kernel.
        slices: (B, S, D, C) for each of its tensor descriptors.
        arguments: its other tensors and numbers.
        constants: its compile-time constants, without those of the configuration.
        programs: number of programs, from the number of tokens whose results each computes.
    """

    kernel: KernelName
    slices: dict[str, Tensor]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    programs: Callable[[int], int]


Run = Callable[[Launch], None]


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make x's CUDA device the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _unit(element_size: Any) -> Any:
    """Return the number of elements in 16 bytes."""
    return 16 // element_size


def _padded(channels: Any, element_size: Any) -> Any:
    unit = _unit(element_size)
    return -(-channels // unit) * unit


def _is_readable(x: Tensor) -> bool:
    """Return whether the kernels read a map (B, C, H, W) without a copy."""
    if x.device.type != "meta" and x.data_ptr() % 16:
        return False
    unit = _unit(x.element_size())
    if x.is_contiguous(memory_format=torch.channels_last):
        return bool(x.shape[1] % unit == 0)
    sizes, strides = list(x.shape), list(x.stride())
    channels, channel_stride = sizes.pop(1), strides.pop(1)
    return (channels == 1 or channel_stride == 1) and all(
        size == 1 or (stride > 0 and stride % unit == 0)
        for size, stride in zip(sizes, strides, strict=True)
    )


def _buffer(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a map of x's shape in the kernels' layout."""
    batch, channels, height, width = x.shape
    padded = _padded(channels, dtype.itemsize)
    buffer = x.new_empty(batch, height, width, padded, dtype=dtype)
    return buffer[..., :channels].permute(0, 3, 1, 2)


def _readable(x: Tensor, dtype: torch.dtype, run: Run) -> Tensor:
    """Return x, or a copy in the kernels' layout."""
    if x.dtype == dtype and _is_readable(x):
        return x
    buffer = _buffer(x, dtype)
    _copy(x, buffer, run)
    return buffer


def _copy(source: Tensor, target: Tensor, run: Run) -> None:
    """Copy a map (B, C, H, W) from one layout into another, with coalesced reads and writes."""
    batch, channels, height, width = source.shape
    strides = {"source": list(source.stride()), "target": list(target.stride())}
    for each in strides.values():  # an axis of length 1 may have any stride
        each[3] = each[2] if width == 1 else each[3]
        each[2] = each[3] * width if height == 1 else each[2]
    outer, inner = height, width
    if all(each[2] == each[3] * width for each in strides.values()):
        outer, inner = 1, height * width
    elif any(each[2] == 1 for each in strides.values()):
        outer, inner = width, height
        for each in strides.values():
            each[2:] = reversed(each[2:])
    tile_a, tile_d = (min(_TILE, power_of_two(size)) for size in (inner, channels))
    arguments: dict[str, Any] = {"source": source, "target": target}
    arguments |= {"A": inner, "D": channels, "R": outer}
    reach = 0
    for name, (b, d, r, a) in strides.items():
        arguments |= {f"{name}_b": b, f"{name}_r": r, f"{name}_a": a, f"{name}_d": d}
        reach = max(reach, inner * a + channels * d)
    constants = {"WIDE": reach >= 2**31, "TILE_A": tile_a, "TILE_D": tile_d}
    programs = batch * outer * -(-inner // tile_a) * -(-channels // tile_d)
    run(Launch("copy", {}, arguments, constants, lambda tokens: programs))


def parts(batch: Any, slices: Any, tokens: Any) -> Any:
    """Return the number of parts into which `backward_keys` divides the slices of an image.

    As many as make `_PROGRAMS` programs, at least 1, and at most one per slice.
    """
    return minimum(slices, maximum(1, _PROGRAMS // (batch * -(-tokens // 64))))


def workspace(shape: Sequence[Size], size: Size) -> tuple[Size, Size, Size]:
    """Compute the bytes besides inputs, results and statistics for a contiguous (B, C, H, W).

    Returns:
        Forward: the transposed map and result. Backward: the transposed map, gradient and result,
        δ, and the partial sums of the keys' gradients. The attended columns, if they are kept.
    """
    batch, channels, height, width = shape
    transposed = batch * height * width * _padded(channels, size) * size
    sums = height * parts(batch, width, channels) + width * parts(batch, height, channels)
    deltas = batch * (height + width) * (channels + -(-channels // 16))
    sums_and_deltas = 4 * (deltas + batch * sums * _padded(channels, 4))
    return 2 * transposed, 3 * transposed + sums_and_deltas, transposed


def empty_result(
    x: Tensor, gamma: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results of `forward`.

    The result is in the wider dtype of x and gamma; the attended columns are empty without `keep`.
    """
    batch, channels, height, width = x.shape
    dtype = x.dtype if gamma is None else torch.promote_types(x.dtype, gamma.dtype)
    return (
        torch.empty_like(x, dtype=dtype),
        x.new_empty(2, batch, width, channels, dtype=torch.float32),
        x.new_empty(2, batch, height, channels, dtype=torch.float32),
        _buffer(x, x.dtype) if keep else x.new_empty(0),
    )


def _attention(
    kernel: KernelName,
    slices: dict[str, Tensor],
    arguments: dict[str, Any],
    scale: float,
    precision: str,
    each: int,
    **constants: bool,
) -> Launch:
    """Describe a launch of an attention kernel with `each` programs for a block of tokens."""
    _, count, _, tokens = slices["x"].shape
    return Launch(
        kernel,
        slices,
        {"S": count, "C": tokens, "scale": max(abs(scale) * _LOG2_E, _LEAST_SCALE)} | arguments,
        {"NEGATIVE": scale < 0, "PRECISION": precision} | constants,
        lambda own: each * -(-tokens // own),
    )


def _readable_key(key: Tensor, dtype: torch.dtype, run: Run) -> Tensor:
    """View a key (B, C, D) as the one slice (B, 1, D, C) of a map in the kernels' layout."""
    return _readable(key.unsqueeze(-1), dtype, run).permute(0, 3, 2, 1)


def forward(
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    gamma: Tensor | None,
    scale: float,
    keep: bool,
    precision: str,
    run: Run,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute columns + rows, or gamma · (columns + rows) + x.

    Args:
        x: feature map, (B, C, H, W), not empty.
        column_key: (B, C, H).
        row_key: (B, C, W).
        gamma: one number, or None.
        scale: factor on the scores, of either sign.
        keep: whether to keep the attended columns, with which the backward is faster.
        precision: of float32 products: "ieee" or "tf32".
        run: launches a kernel.

    Returns:
        The result (B, C, H, W) in x's memory layout, and three tensors for the backward: for each
        row of the maps the maximum before the scale and the base-2 logarithm of the sum, (2, B, W,
        C) for columns and (2, B, H, C) for rows; and the attended columns, (B, C, H, W) or empty.
    """
    out, *statistics, kept = empty_result(x, gamma, keep)
    x = _readable(x, x.dtype, run)
    result = out if _is_readable(out) else _buffer(out, out.dtype)
    columns = kept if keep else result
    for cut, key, (m, log_l) in zip(_CUTS, (column_key, row_key), statistics, strict=True):
        last = cut is ROWS
        of_x = cut(x).mT
        slices = {"x_own": of_x, "x": of_x, "key": _readable_key(key, x.dtype, run)}
        slices["out_own"] = cut(result if last else columns).mT
        arguments: dict[str, Any] = {"gamma": gamma, "m": m, "log_l": log_l}
        _give(slices, arguments, "kept_own", cut(columns).mT if last else None)
        run(
            _attention(
                "forward", slices, arguments, scale, precision, m.shape[0] * m.shape[1],
                ADD=last, RESIDUAL=last and gamma is not None,
            )
        )  # fmt: skip
    if result is not out:
        _copy(result, out, run)
    return out, statistics[0], statistics[1], kept


def _give(
    slices: dict[str, Tensor], arguments: dict[str, Any], name: str, given: Tensor | None
) -> None:
    """Pass slices as tensor descriptors, or None in place of both."""
    if given is None:
        arguments |= {name: None, f"{name}_rest": None}
    else:
        slices[name] = given


def backward(
    grad: Tensor,
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    gamma: Tensor | None,
    column_statistics: Tensor,
    row_statistics: Tensor,
    kept: Tensor,
    scale: float,
    precision: str,
    run: Run,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward` from its arguments and its last three results.

    Returns:
        The gradients of x, column_key, row_key and gamma; the last is empty without a gamma.
    """
    batch, channels, height, width = x.shape
    grad_x = torch.empty_like(x)
    grad_gamma = x.new_empty(0) if gamma is None else torch.empty_like(gamma)
    x, grad = (_readable(each, x.dtype, run) for each in (x, grad))
    # Saved-tensor hooks may return a tensor in another layout.
    kept = _readable(kept, x.dtype, run) if kept.numel() else kept
    result = grad_x if _is_readable(grad_x) else _buffer(grad_x, x.dtype)
    # Sums over 16 tokens each of δ of both maps' rows, in float32.
    sixteens = -(-channels // 16)
    all_delta_sums = x.new_empty(batch * (height + width), sixteens, dtype=torch.float32)
    delta_sums = all_delta_sums[: batch * width], all_delta_sums[batch * width :]
    sums: list[Tensor] = []
    statistics = (column_statistics.contiguous(), row_statistics.contiguous())
    for cut, key, (m, log_l), part_of_sums in zip(
        _CUTS, (column_key, row_key), statistics, delta_sums, strict=True
    ):
        first = cut is COLUMNS
        of_x, of_grad, of_result = (cut(each).mT for each in (x, grad, result))
        of_key = _readable_key(key, x.dtype, run)
        given = {"gamma": gamma, "m": m, "log_l": log_l, "delta": torch.empty_like(m)}
        slices = {"x_own": of_x, "grad_own": of_grad, "x": of_x, "key": of_key}
        slices["out_own"] = of_result
        arguments = given | {"delta_sums": part_of_sums, "signed_scale": scale}
        attended = cut(kept).mT if first and kept.numel() else None
        _give(slices, arguments, "kept_own", attended)
        run(
            _attention(
                "backward_queries", slices, arguments, scale, precision, m.shape[0] * m.shape[1],
                KEPT=attended is not None, ADD=not first,
                GAMMA=gamma is not None, RESIDUAL=first and gamma is not None,
            )
        )  # fmt: skip
        count = parts(*m.shape)
        shape = (batch, count, key.shape[2], _padded(channels, 4))
        sums.append(x.new_empty(shape, dtype=torch.float32))
        run(
            _attention(
                "backward_keys",
                {"x_own": of_x, "key_own": of_key, "x": of_x, "grad": of_grad,
                 "out_own": of_result, "sums_own": sums[-1][..., :channels]},
                given | {"parts": count}, scale, precision, batch * count,
                GAMMA=gamma is not None,
            )
        )  # fmt: skip

    grad_keys = [
        x.new_empty(batch, key.shape[2], channels, dtype=key.dtype) for key in (column_key, row_key)
    ]
    arguments = {
        "column_sums": sums[0], "row_sums": sums[1], "delta_sums": all_delta_sums,
        "gamma": gamma, "grad_column_key": grad_keys[0], "grad_row_key": grad_keys[1],
        "grad_gamma": grad_gamma, "B": batch, "C": channels, "H": height, "W": width,
        "PADDED_C": sums[0].shape[-1], "column_parts": sums[0].shape[1],
        "row_parts": sums[1].shape[1], "deltas": all_delta_sums.numel(), "signed_scale": scale,
    }  # fmt: skip
    programs = sum(-(-each.numel() // _BLOCK) for each in grad_keys) + 1
    constants = {"GAMMA": gamma is not None, "BLOCK": _BLOCK}
    run(Launch("finish", {}, arguments, constants, lambda own: programs))
    if result is not grad_x:
        _copy(result, grad_x, run)
    column, row = (
        _in_layout_of(key, each.mT)
        for key, each in zip((column_key, row_key), grad_keys, strict=True)
    )
    return grad_x, column, row, grad_gamma


def _in_layout_of(key: Tensor, grad: Tensor) -> Tensor:
    return grad if grad.stride() == key.stride() else torch.empty_like(key).copy_(grad)
