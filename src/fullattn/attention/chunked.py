"""Attention on the CPU by PyTorch's matrix products, a few slices of the map at a time.

A block of the map that fits a core's cache is computed, normalised and multiplied with the values;
its buffer is used again for the next block. Backward recomputes each block from the saved query and
key. Nothing of map size is allocated.

Forward and backward are custom operators (`fullattn::attend_chunked`), so that `torch.compile` sees
one call in place of a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, bmm

from fullattn.attention import flops, operators, reference
from fullattn.attention.backend import (
    Backend,
    BranchSizes,
    ScoreFunction,
    Setting,
    Workspace,
    work_dtype,
)
from fullattn.attention.sizes import Size, at_least, less, maximum, minimum, where

__all__ = ["BACKEND", "attend", "backward", "forward"]

# `bmm` by this name: counters of FLOPs replace `torch.bmm`, and count the operator here as well.

# Map elements in one block: 2 MB of float32, which fit the second-level caches of two cores. On
# Zen 4, at 1x512x97x97 and 4x128x64x64, the time is the same between 1 and 4 MB.
_BLOCK = 2**19
# Slices gathered at a time: 16 float32 fill a cache line, so that every line of a feature map is
# read once, also where the features are strided.
_GATHER = 16


def _suits_blas(x: Tensor) -> bool:
    """Return whether each slice of x (n, tokens, features) is a matrix that BLAS reads in place."""
    rows, columns = x.stride()[-2:]
    return (columns == 1 and rows >= x.shape[-1]) or (rows == 1 and columns >= x.shape[-2])


def _load(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return slices (n, tokens, features) if BLAS can read them, otherwise a contiguous copy."""
    return x if x.dtype == dtype and _suits_blas(x) else x.to(dtype).contiguous()


class _Plan(NamedTuple):
    """How a call is split into groups of slices, and those into blocks of the map.

    Attributes:
        group: slices that are gathered at a time.
        block: slices in a block.
        rows: query tokens in a block.
        numel: map elements in a block.
    """

    group: Size
    block: Size
    rows: Size
    numel: Size


def _plan(slices: Size, tokens: Size, memory: Size) -> _Plan:
    """Split slices of `tokens` queries and `memory` keys into blocks of about `_BLOCK` elements."""
    slice_numel = tokens * memory
    block = maximum(1, _BLOCK // maximum(1, slice_numel))
    long = less(2 * _BLOCK, slice_numel)
    rows = where(long, maximum(64, _BLOCK // maximum(1, memory)), tokens)
    return _Plan(maximum(_GATHER, block), block, rows, minimum(block, slices) * rows * memory)


_plan_of_integers = lru_cache(maxsize=256)(_plan)


def _ranges(length: int, step: Any) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _of_group(x: Tensor, image: int, group: slice, dtype: torch.dtype) -> Tensor:
    """Return the slices of one group (n, tokens, features), or the shared slice with n = 1."""
    return _load(x[image] if x.shape[1] == 1 else x[image, group], dtype)


def _of_block(x: Tensor, block: slice) -> Tensor:
    return x.expand(block.stop - block.start, -1, -1) if x.shape[0] == 1 else x[block]


def _is_same(query: Tensor, value: Tensor) -> bool:
    """Return whether query and value are the same view, which is then gathered once."""
    return (
        query.data_ptr() == value.data_ptr()
        and query.shape == value.shape
        and query.stride() == value.stride()
    )


def _like_query(query: Tensor, features: int) -> Tensor:
    """Allocate (B, S, N, features) in the query's memory layout if the two have one shape."""
    if features == query.shape[-1]:
        return torch.empty_like(query)
    return query.new_empty(*query.shape[:-1], features)


def _scores(query: Tensor, key: Tensor, scale: float, buffer: Tensor) -> Tensor:
    """Write softmax(scale · query · keyᵀ) of one block into the front of `buffer`."""
    count, tokens, memory = query.shape[0], query.shape[1], key.shape[1]
    weights = buffer[: count * tokens * memory].view(count, tokens, memory)
    bmm(query, key.mT, out=weights)
    if scale != 1.0:
        weights.mul_(scale)
    return torch.softmax(weights, -1, out=weights)


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute `attend` without autograd, on any device."""
    dtype = work_dtype(query.dtype)
    out = _like_query(query, value.shape[-1])
    (batch, slices, length, _), same = query.shape, _is_same(query, value)
    plan: Any = _plan_of_integers(slices, length, key.shape[2])
    buffer = torch.empty(plan.numel, dtype=dtype, device=query.device)
    for image in range(batch):
        for group in _ranges(slices, plan.group):
            queries = _of_group(query, image, group, dtype)
            keys = _of_group(key, image, group, dtype)
            values = queries if same else _of_group(value, image, group, dtype)
            result = queries.new_empty(queries.shape[0], length, value.shape[-1])
            for block in _ranges(len(queries), plan.block):
                for tokens in _ranges(length, plan.rows):
                    weights = _scores(queries[block, tokens], _of_block(keys, block), scale, buffer)
                    # A block of whole slices is contiguous, as the batched product requires.
                    bmm(weights, _of_block(values, block), out=result[block, tokens])
            out[image, group].copy_(result)
    return out


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value of `forward`, on any device."""
    dtype = work_dtype(query.dtype)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    (batch, slices, length, _), same = query.shape, _is_same(query, value)
    plan: Any = _plan_of_integers(slices, length, key.shape[2])
    buffer = torch.empty(plan.numel, dtype=dtype, device=query.device)
    grad_buffer = torch.empty_like(buffer)
    for image in range(batch):
        shared_key = key.new_zeros(1, *key.shape[2:], dtype=dtype)
        shared_value = value.new_zeros(1, *value.shape[2:], dtype=dtype)
        for group in _ranges(slices, plan.group):
            queries = _of_group(query, image, group, dtype)
            keys = _of_group(key, image, group, dtype)
            values = queries if same else _of_group(value, image, group, dtype)
            grads = _of_group(grad, image, group, dtype)
            to_query = queries.new_empty(queries.shape)
            to_key = shared_key if key.shape[1] == 1 else keys.new_zeros(keys.shape)
            to_value = shared_value if value.shape[1] == 1 else values.new_zeros(values.shape)
            for block in _ranges(len(queries), plan.block):
                for tokens in _ranges(length, plan.rows):
                    block_query, block_grad = queries[block, tokens], grads[block, tokens]
                    block_key, block_value = _of_block(keys, block), _of_block(values, block)
                    weights = _scores(block_query, block_key, scale, buffer)
                    grad_scores = grad_buffer[: weights.numel()].view(weights.shape)
                    bmm(block_grad, block_value.mT, out=grad_scores)
                    torch.ops.aten._softmax_backward_data.out(
                        grad_scores, weights, -1, dtype, grad_input=grad_scores
                    )
                    if scale != 1.0:
                        grad_scores.mul_(scale)
                    bmm(grad_scores, block_key, out=to_query[block, tokens])
                    _accumulate(to_key, block, grad_scores.mT, block_query)
                    _accumulate(to_value, block, weights.mT, block_grad)
            grad_query[image, group].copy_(to_query)
            for grads_of, found in ((grad_key, to_key), (grad_value, to_value)):
                if grads_of.shape[1] != 1:
                    grads_of[image, group].copy_(found)
        for grads_of, found in ((grad_key, shared_key), (grad_value, shared_value)):
            if grads_of.shape[1] == 1:
                grads_of[image].copy_(found)
    return grad_query, grad_key, grad_value


def _accumulate(total: Tensor, block: slice, left: Tensor, right: Tensor) -> None:
    """Add left · right (n, a, b) to the block's slices of `total`, or their sum to a shared one."""
    if total.shape[0] == 1:
        total[0].addbmm_(left, right)
    else:
        total[block].baddbmm_(left, right)


def _workspace(a: BranchSizes, setting: Setting) -> Workspace:
    size, work, half = setting.size, setting.work_size, setting.half
    batch, slices = a.query[:2]
    plan = _plan(slices, a.query[2], a.key[2])
    group = minimum(plan.group, slices)
    # From the second group on, the old tensor is held while the new one is made.
    twice = at_least(slices, 2 * group)
    several = less(1, batch) * at_least(group, slices)
    again = where(maximum(twice, several), group, slices - group)
    buffer = plan.numel * work

    def gathered(shape: tuple[Size, ...]) -> Size:
        """Return the bytes of the copy of one slice."""
        return prod(shape[2:]) * work * (half if a.in_place else 1)

    query, grad = gathered(a.query), gathered(a.out)
    value = 0 if a.value_is_query else gathered(a.value)
    # Keys are cast, but never gathered: they are one slice, or BLAS reads them in place.
    key = half * prod(a.key[2:]) * work
    # A cast keeps the strides, and is copied once more.
    casting = 1 if a.contiguous else 1 + half
    result = prod(a.out[2:]) * work
    output = prod(a.out) * size
    one_slice = at_least(1, slices)
    # `values` still refers to the old query while the key is cast again.
    same = one_slice * query if a.value_is_query else 0
    inference = (
        output
        + buffer
        + key
        + group * (query + value + result)
        + again * maximum(casting * query, casting * value, result, same + key)
    )
    to_query, to_key, to_value = (prod(x[2:]) * work for x in (a.query, a.key, a.value))
    grads = (prod(a.query) + prod(a.key) + prod(a.value)) * size
    repeated = again * where(
        one_slice,
        query + key + value + grad + to_query + to_key + to_value,
        query + value + grad + maximum(to_query, to_value),
    )
    backward = (
        grads
        + 2 * buffer
        + key
        + group * (query + value + grad + to_query + to_value)
        + to_key
        + repeated
    )
    return Workspace(
        flops=flops.attend(a.query, a.key, a.value),
        backward_flops=flops.attend_backward(a.out, a.query, a.key, a.value),
        output=output,
        inference=inference,
        saved=0,
        forward=inference,
        backward=backward + output,
        backward_shared=backward,
    )


attend: Callable[..., Any] = operators.register(
    "attend_chunked",
    ("query", "key", "value"),
    forward=forward,
    forward_flops=flops.attend,
    backward=backward,
    backward_flops=flops.attend_backward,
    definition=reference.attend,
    empty_result=lambda query, key, value, scale: _like_query(query, value.shape[-1]),
)

BACKEND = Backend(
    name="chunked",
    summary="a few slices of the map at a time, in reused buffers, by PyTorch's matrix products",
    attend={ScoreFunction.SOFTMAX: attend},
    workspace=_workspace,
    own_operators=True,
    devices=frozenset({"cpu"}),
)
