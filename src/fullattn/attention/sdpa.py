"""PyTorch's fused attention, with inputs in the layouts that its fused kernels support.

`torch.nn.functional.scaled_dot_product_attention` silently builds the map if its fused kernels do
not support an input. This module therefore passes 4-D inputs with stride 1 in the last axis, pads
features to a supported length (CUDA: a multiple of 8; CPU: the same length for key and value),
passes a positive scale, and keeps batch times slices below the 65,536 at which the CUDA grid
overflows (pytorch issues 142228 and 146704).
"""

from __future__ import annotations

import math
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullattn._versions import is_exporting
from fullattn.attention import chunked, flops, operators, reference
from fullattn.attention.backend import (
    FLOATING,
    Backend,
    BranchSizes,
    ScoreFunction,
    Setting,
    Workspace,
    work_dtype,
)
from fullattn.attention.sizes import Size, at_least, equal, less, maximum, minimum, where
from fullattn.attention.tracing import is_jit_traced, statically_true

__all__ = ["BACKEND", "attend"]

_CUDA_GRID = 65_535


def padded_features(device: str, features: int, value_features: int) -> tuple[int, int]:
    """Return the lengths to which queries and keys, and values, are padded for fused kernels."""
    if device == "cuda":
        return -(-features // 8) * 8, -(-value_features // 8) * 8
    # A contiguous axis of length 1 may have any stride, and the fused kernel requires 1.
    if statically_true(features == value_features) and statically_true(features > 1):
        return features, features
    longest = max(features, value_features, 2)
    return longest, longest


def _pad_features(x: Tensor, features: int) -> Tensor:
    missing = features - x.shape[-1]
    if statically_true(missing == 0):
        return x.contiguous()
    # `pad` keeps the order of the strides, which for the columns of an image is channels_last.
    # Where a symbolic size turns out to miss nothing, AOTAutograd believes it does not.
    source = x.contiguous() if torch.compiler.is_compiling() else x
    return F.pad(source, (0, missing)).contiguous()


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Compute `fullattn.attention.attend` by `scaled_dot_product_attention`."""
    if work_dtype(query.dtype) != query.dtype and torch.onnx.is_in_onnx_export():
        # PyTorch's kernels compute the scores of float16 in float32. In ONNX they would be float16:
        # unscaled scores past 65504 would be infinite, and the result NaN.
        return attend(query.float(), key.float(), value.float(), scale).to(query.dtype)
    if is_jit_traced():  # the sizes are not known, and the program may run on any device
        key, value = (x.expand(-1, query.shape[1], -1, -1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    slices, value_features = query.shape[1], value.shape[-1]
    if scale < 0:  # a negative scale has been a source of bugs in the fused kernels
        query, scale = -query, -scale
    features, value_padded = padded_features(query.device.type, query.shape[-1], value_features)
    query, key = _pad_features(query, features), _pad_features(key, features)
    value = _pad_features(value, value_padded)
    key, value = _of_every_slice(key, slices), _of_every_slice(value, slices)
    if query.device.type == "cpu" and not is_exporting():
        out: Tensor = _attend_on_cpu(query, key, value, scale)[0]
    elif query.device.type == "cuda" and statically_true(query.shape[0] * slices > _CUDA_GRID):
        out = _in_parts(query, key, value, scale)
    else:
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out if statically_true(value_padded == value_features) else out[..., :value_features]


def _of_every_slice(x: Tensor, slices: int) -> Tensor:
    # Inductor cannot order the strides of a view with symbolic sizes that is saved for backward,
    # and `expand` returns a view even if it changes nothing.
    return x if statically_true(x.shape[1] == slices) else x.expand(-1, slices, -1, -1)


def _in_parts(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, slices = query.shape[:2]
    axis = 0 if batch >= slices else 1
    step = max(1, _CUDA_GRID // (slices if axis == 0 else batch))
    parts = zip(*(torch.split(x, step, axis) for x in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in parts], dim=axis
    )


# The CPU kernel keeps the logarithm of each softmax's sum, which float32 rounds by 6e-8 of itself;
# its backward computes weights from that, and so has this relative error times the largest score.
_MOST_ROUNDING = 5e-4
_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _kernel(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _KERNEL(query, key, value, scale=scale)
    return result


def _kernel_backward(*tensors_and_scale: Any) -> tuple[Tensor, ...]:
    *tensors, scale = tensors_and_scale
    grads: tuple[Tensor, ...] = _KERNEL_BACKWARD(*tensors, 0.0, False, scale=scale)
    return grads


def _forward_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, log_sum = _kernel(query, key, value, scale)
    # The kernel hides some of the NaN and infinities of its inputs.
    if not all(map(_is_finite, (query, key, value, log_sum))):
        return out.copy_(chunked.forward(query, key, value, scale)), log_sum.fill_(torch.inf)
    return out, log_sum


def _is_finite(x: Tensor) -> bool:
    # Without copies: a slice of a tensor that all slices share, and no sum, which may overflow.
    shared = x[:, :1] if x.stride(1) == 0 else x
    return x.numel() == 0 or all(map(math.isfinite, map(Tensor.item, shared.aminmax())))


def _backward_on_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    largest = log_sum.abs().amax().item() if log_sum.numel() else 0.0
    # It is infinite after `chunked.forward`.
    if largest * torch.finfo(log_sum.dtype).eps <= _MOST_ROUNDING:
        return _kernel_backward(grad, query, key, value, out, log_sum, scale)
    exact = chunked.backward(grad, query, key, value, scale)
    if query.shape[1] == 1:  # in either layout
        return tuple(x.contiguous() for x in exact)
    return tuple(_in_kernel_layout(x).copy_(x) for x in exact)


def _in_kernel_layout(x: Tensor) -> Tensor:
    """Return an empty (B, S, N, D) in the layout of the kernel's gradients, (B, N, S, D)."""
    batch, slices, tokens, features = x.shape
    return x.new_empty(batch, tokens, slices, features).transpose(1, 2)


_attend_on_cpu = operators.register(
    "attend_sdpa",
    ("query", "key", "value"),
    forward=_forward_on_cpu,
    forward_flops=flops.attend,
    backward=_backward_on_cpu,
    backward_flops=flops.attend_backward,
    empty_grads=_kernel_backward,
    definition=reference.attend,
    empty_result=_kernel,
    keeps_result=True,
    statistics=("log_sum",),
)

# PyTorch's FLOP counter has formulas for the CUDA kernels of SDPA, but not for the CPU kernel.
flops.register(_KERNEL, flops.attend)
flops.register(_KERNEL_BACKWARD, flops.attend_backward)


def _workspace(a: BranchSizes, setting: Setting) -> Workspace:
    size = setting.size
    # As in `padded_features`.
    if setting.device == "cuda":
        features, value_features = (8 * -(-x[3] // 8) for x in (a.query, a.value))
    else:
        features = value_features = maximum(a.query[3], a.value[3], 2)
    query, key = (*a.query[:3], features), (*a.key[:3], features)
    value, out = (*a.value[:3], value_features), (*a.query[:3], value_features)
    copies: Size = 0
    for given, taken, negated in (
        (a.query, query, a.scale < 0),
        (a.key, key, False),
        (a.value, value, False),
    ):
        copied = 1 - equal(given[3], taken[3]) if a.contiguous and not negated else 1
        copies += copied * prod(taken) * size
    output = prod(out) * size
    log_sum = prod(out[:3]) * 4
    saved = copies + log_sum
    forward_block, backward_block = _blocks(a, setting, value_features)
    # The fused kernel reads the key's copy as if it had all slices; its gradient has them.
    grads = (prod(query) + prod(a.query[:2]) * a.key[2] * (features + value_features)) * size
    same = equal(value_features, a.value[3])  # otherwise the gradient of the output is padded too
    backward = saved + grads + backward_block
    return Workspace(
        flops=flops.attend(query, key, value),
        backward_flops=flops.attend_backward(out, query, key, value),
        output=output,
        inference=saved + output + forward_block,
        saved=saved,
        forward=saved + output + forward_block,
        backward=backward + output,
        backward_shared=backward + (1 - same) * output,
        contiguous_grad=0 if a.contiguous else same * output,
        keeps_inputs=equal(copies, 0),
        keeps_output=True,
    )


def _blocks(a: BranchSizes, setting: Setting, value_features: Size) -> tuple[Size, Size]:
    """Compute the bytes of the CPU kernel's buffers, forward and backward: blocks per thread."""
    if setting.device != "cpu":
        return 0, 0
    tokens, memory, work = a.query[2], a.key[2], setting.work_size
    block_rows = where(at_least(tokens, 768), 256, where(at_least(tokens, 192), 64, 32))
    rows = minimum(tokens, block_rows)
    block = rows * minimum(memory, 512) * (work + less(setting.size, work) * setting.size)
    rest = rows * (2 + value_features) * work
    return setting.threads * (block + rest), setting.threads * 2 * block


BACKEND = Backend(
    name="sdpa",
    summary="torch.nn.functional.scaled_dot_product_attention on copied slices",
    attend={ScoreFunction.SOFTMAX: attend},
    workspace=_workspace,
    # CUDA's fused kernels do not take float64.
    dtypes={"*": FLOATING, "cuda": FLOATING - {torch.float64}},
)
