"""Fused GPU kernels for axial channel attention, in Triton.

Both branches read the feature map in channels_last, and one key for all slices of an image. The map
stays in registers, a block at a time; gamma and the residual are added when the result is written.
Backward recomputes the map from the maximum and the sum of each row. See `kernels` for the kernels,
`launch` for their arguments, and `configurations` and `tuning` for the block sizes.

This module is imported with the package; Triton itself is imported when a kernel first runs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from fullattn._text import installing
from fullattn._versions import allows_tf32
from fullattn.attention import chunked, flops, operators, reference
from fullattn.attention.backend import (
    FLOATING,
    AttentionInputs,
    Backend,
    ScoreFunction,
    Setting,
    Workspace,
)
from fullattn.attention.residual import scaled_residual
from fullattn.attention.sizes import Size
from fullattn.attention.tracing import is_jit_traced, is_transformed
from fullattn.attention.triton import launch
from fullattn.attention.triton.configurations import MOST_FEATURES
from fullattn.reshape import COLUMNS, ROWS

__all__ = ["BACKEND", "axial_channel_attention", "axial_means"]

_OLDEST_TRITON = (3, 6)
_OLDEST_CARD = (8, 0)
# The interpreter runs kernels on the CPU, for tests: right in float32 and float16, but silently
# wrong in bfloat16. Triton reads this variable when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Why kernels did not compile or fit on this machine, by device, dtype and shape: not tried again.
_failed: dict[tuple[Any, ...], str] = {}


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed ({installing('triton')})"
    try:
        import triton
    except Exception as error:
        return f"Triton does not import: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"needs Triton {oldest} or newer, this is {triton.__version__}"
    return None


def _unavailable() -> str | None:
    if (missing := _missing()) is not None or _INTERPRETED:
        return missing
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "made and tested for NVIDIA cards, not for ROCm"
    card = torch.cuda.get_device_capability()
    if card < _OLDEST_CARD:
        needed, found = (".".join(map(str, capability)) for capability in (_OLDEST_CARD, card))
        return f"needs compute capability {needed} or newer, this card has {found}"
    return None


# torch.compile calls this once and does not trace into it, as in `native`.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _precision() -> str:
    """Return the precision of float32 products: "tf32" if PyTorch's setting allows it."""
    return "tf32" if allows_tf32() else "ieee"


@functools.cache
def _reasons(device: str, dtype: torch.dtype, features: int) -> tuple[str, ...]:
    """Return the reasons why the kernels cannot run."""
    operation, score = next(iter(BACKEND.operations)), ScoreFunction.SOFTMAX
    inputs = AttentionInputs(operation, score, device, dtype, True, 0, 0, features)
    return tuple(BACKEND.reasons_against(inputs))


def _or_fallback(x: Tensor, run: Callable[[], Any], fallback: Callable[[], Any]) -> Any:
    """Return run(), or, if its kernels do not compile or fit, warn once and return fallback()."""
    # Without the strides: those of a saved tensor may have changed in the backward pass.
    where = (x.device, x.dtype, x.shape[1:])
    if where in _failed:
        return fallback()
    # Eager calls were already checked by the dispatcher. An exported program may run on another
    # machine, so check again, once for each kind of input.
    reasons = _reasons(x.device.type, x.dtype, max(x.shape[2:]))
    if not reasons:
        from triton.errors import TritonError

        try:
            return run()
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        # Triton raises RuntimeError if a compiler pass or the search for a tool fails.
        except (TritonError, RuntimeError, subprocess.CalledProcessError, OSError) as error:
            first_line = str(error).partition("\n")[0][:200]
            reasons = (f"{type(error).__name__}: {first_line}",)
    _failed[where] = reasons[0]
    warnings.warn(
        f"fullattn's Triton kernels cannot run at shape {tuple(x.shape)} in "
        f"{str(x.dtype).removeprefix('torch.')} on {x.device} ({reasons[0]}); PyTorch's matrix "
        "products do, more slowly, from now on for this shape",
        RuntimeWarning,
        stacklevel=2,
    )
    return fallback()


def _attended(x: Tensor, column_key: Tensor, row_key: Tensor, scale: float) -> Tensor:
    height, width = x.shape[2:]
    columns, rows = COLUMNS(x), ROWS(x)
    attended_columns = chunked.forward(columns, column_key.unsqueeze(1), columns, scale)
    attended_rows = chunked.forward(rows, row_key.unsqueeze(1), rows, scale)
    return COLUMNS.inverse(attended_columns, height, width) + ROWS.inverse(
        attended_rows, height, width
    )


_Results = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(
    x: Tensor, column_key: Tensor, row_key: Tensor, gamma: Tensor | None, scale: float, keep: bool
) -> _Results:
    def run() -> _Results:
        from fullattn.attention.triton import tuning

        with launch.on_device_of(x):
            return launch.forward(
                x, column_key, row_key, gamma, scale, keep, _precision(), tuning.run
            )

    def fallback() -> _Results:
        attended = _attended(x, column_key, row_key, scale)
        out, *kept = launch.empty_result(x, gamma, keep)
        out.copy_(scaled_residual(x, gamma, attended))
        # The backward of this shape is the fallback too, and does not use the statistics.
        return out, kept[0].zero_(), kept[1].zero_(), kept[2].zero_()

    if x.numel() == 0:
        return launch.empty_result(x, gamma, keep)
    result: _Results = _or_fallback(x, run, fallback)
    return result


def _backward(
    grad: Tensor,
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    gamma: Tensor | None,
    column_statistics: Tensor,
    row_statistics: Tensor,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, column_key, row_key, gamma)

    def run() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from fullattn.attention.triton import tuning

        with launch.on_device_of(x):
            return launch.backward(
                grad,
                *inputs,
                column_statistics,
                row_statistics,
                kept,
                scale,
                _precision(),
                tuning.run,
            )

    def fallback() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        upper = (grad if gamma is None else grad * gamma).to(x.dtype)
        grad_x = torch.zeros_like(x) if gamma is None else torch.empty_like(x).copy_(grad)
        grad_keys = []
        for cut, key in ((COLUMNS, column_key), (ROWS, row_key)):
            slices = cut(x)
            queries, keys, values = chunked.backward(
                cut(upper), slices, key.unsqueeze(1), slices, scale
            )
            grad_x += cut.inverse(queries + values, *x.shape[2:])
            grad_keys.append(torch.empty_like(key).copy_(keys.squeeze(1)))
        grad_gamma = grad.new_empty(0)
        if gamma is not None:
            attended = _attended(x, column_key, row_key, scale)
            grad_gamma = (grad.float() * attended.float()).sum().to(gamma.dtype)
            grad_gamma = grad_gamma.reshape(gamma.shape)
        return grad_x, grad_keys[0], grad_keys[1], grad_gamma

    if x.numel() == 0:
        empty = [grad.new_empty(0) if i is None else torch.zeros_like(i) for i in inputs]
        return empty[0], empty[1], empty[2], empty[3]
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _or_fallback(x, run, fallback)
    return result


_operator = operators.register(
    "attend_triton",
    ("x", "column_key", "row_key", "gamma"),
    forward=_forward,
    forward_flops=flops.axial_channel_attention,
    backward=_backward,
    backward_flops=flops.axial_channel_attention_backward,
    definition=lambda x, column_key, row_key, gamma, scale: scaled_residual(
        x, gamma, reference.attend_columns_and_rows(x, column_key, row_key, scale)
    ),
    empty_result=lambda x, column_key, row_key, gamma, scale, keep: launch.empty_result(
        x, gamma, keep
    ),
    optional=("gamma",),
    statistics=("column_statistics", "row_statistics", "kept"),
    flags=("keep",),
    devices=("CUDA", "CPU"),
)


def axial_channel_attention(
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    scale: float = 1.0,
    gamma: Tensor | None = None,
) -> Tensor:
    """Compute attention over the columns of x plus attention over its rows.

    Args:
        x: feature map, (B, C, H, W), of any strides.
        column_key: (B, C, H).
        row_key: (B, C, W).
        scale: factor on the scores, of either sign.
        gamma: one number; None for 1 and no residual.

    Returns:
        columns + rows, or gamma · (columns + rows) + x; (B, C, H, W) in x's memory layout, and in
        its dtype, or the wider one of x and gamma.
    """
    inputs = (x, column_key, row_key, gamma)
    keep = torch.is_grad_enabled() and any(i is not None and i.requires_grad for i in inputs)
    result: Tensor = _operator(*inputs, scale, keep)[0]
    return result


def axial_means(x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute the means of x over W and over H in one launch.

    Args:
        x: feature map, (B, C, H, W).

    Returns:
        x, (B, H, C) and (B, W, C), as `functional.axial_means`; None for a map that is not in
        channels_last, if the kernels cannot run, and while x is traced.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or not (x.is_cuda or _INTERPRETED)
        or not x.is_contiguous(memory_format=torch.channels_last)
        or x.numel() == 0
        or is_jit_traced()
        or is_transformed()
        or _reasons(x.device.type, x.dtype, 1)
    ):
        return None
    from fullattn.attention.triton.means import AxialMeans

    means: tuple[Tensor, Tensor, Tensor] | None = _or_fallback(
        x, functools.partial(AxialMeans.apply, x), lambda: None
    )
    return means


def _workspace(shape: tuple[Size, ...], setting: Setting) -> Workspace:
    batch, channels, height, width = shape
    x = prod(shape) * setting.size
    rows = 8 * batch * channels * (height + width)  # two elements per row of each map
    forward, backward, kept = launch.workspace(shape, setting.size)
    grad_keys = batch * channels * (height + width) * setting.size
    return Workspace(
        flops=flops.axial_channel_attention(shape),
        backward_flops=flops.axial_channel_attention_backward(shape, shape),
        output=x,
        inference=x + rows + forward,
        saved=rows + kept,
        forward=x + rows + kept + forward,
        backward=2 * x + rows + kept + grad_keys + backward,
        backward_shared=x + rows + kept + grad_keys + backward,
    )


_HALF_AND_SINGLE = FLOATING - {torch.float64}
BACKEND = Backend(
    name="triton",
    summary="GPU kernels: both branches, the shared key and the residual, without a map in memory",
    operations={"axial channel attention": axial_channel_attention},
    operation_workspaces={"axial channel attention": _workspace},
    own_operators=True,
    adds_residual="always",
    most_features=MOST_FEATURES,
    devices=frozenset({"cuda", "cpu"} if _INTERPRETED else {"cuda"}),
    dtypes={"cuda": _HALF_AND_SINGLE, "cpu": _HALF_AND_SINGLE - {torch.bfloat16}},
    unavailable=_unavailable,
)
