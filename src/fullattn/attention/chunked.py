"""Attention on the CPU, a few slices of the map at a time.

A block of the map that fits a core's cache is built, normalised, multiplied with the values and
thrown away; its buffer is used again for the next block. Backward builds each block again from the
saved query and key. Nothing of map size is ever allocated, and every product is one call of
PyTorch's matrix product, which the CPU's BLAS runs near its peak.

Both directions are operators (`fullattn::attend_chunked`): `torch.compile` sees a call, not a loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from fullattn.attention import flops, operators
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

# Elements of the map in one block: 2 MB of float32, which two cores hold in their second-level
# caches. Measured on Zen 4 at 1x512x97x97 and 4x128x64x64: flat between 1 and 4 MB.
_BLOCK = 2**19
# Slices gathered at a time where the features are strided: 16 float32 fill a cache line, so that
# every line of the feature map is read once.
_GATHER = 16


def _suits_blas(x: Tensor) -> bool:
    """Whether each slice of x (n, tokens, features) is a matrix that BLAS reads in place."""
    rows, columns = x.stride()[-2:]
    return (columns == 1 and rows >= x.shape[-1]) or (rows == 1 and columns >= x.shape[-2])


def _load(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return slices (n, tokens, features) if BLAS can read them, otherwise a contiguous copy."""
    return x if x.dtype == dtype and _suits_blas(x) else x.to(dtype).contiguous()


def _plan(slices: Size, tokens: Size, memory: Size) -> tuple[Size, Size, Size, Size]:
    """How one call is cut into blocks of at most `_BLOCK` map elements.

    Args:
        slices: of an image.
        tokens: of a query.
        memory: tokens of a key.

    Returns:
        Slices in a block, query tokens in a block, slices gathered at a time, and map elements in a
        block.
    """
    slice_numel = tokens * memory
    at_once = maximum(1, _BLOCK // maximum(1, slice_numel))
    long = less(2 * _BLOCK, slice_numel)
    rows = where(long, maximum(64, _BLOCK // maximum(1, memory)), tokens)
    return at_once, rows, maximum(_GATHER, at_once), minimum(at_once, slices) * rows * memory


_cached_plan = lru_cache(maxsize=256)(_plan)  # of integers, for the calls themselves


class _Plan:
    """How the slices and tokens of one call are cut into blocks."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        _, self.slices, self.tokens, _ = query.shape
        plan: Any = _cached_plan(self.slices, self.tokens, key.shape[2])
        self.at_once, self.rows, self.gathered, self.block_numel = plan

    def groups(self) -> Iterator[slice]:
        for start in range(0, self.slices, self.gathered):
            yield slice(start, min(start + self.gathered, self.slices))

    def blocks(self, group: slice) -> Iterator[slice]:
        """Slices of one block, counted from the group's first."""
        count = group.stop - group.start
        for start in range(0, count, self.at_once):
            yield slice(start, min(start + self.at_once, count))

    def token_ranges(self) -> Iterator[slice]:
        for start in range(0, self.tokens, self.rows):
            yield slice(start, min(start + self.rows, self.tokens))


def _of_group(x: Tensor, image: int, group: slice, dtype: torch.dtype) -> Tensor:
    """Return the slices of one group (n, tokens, features), or the shared slice with n = 1."""
    if x.shape[1] == 1:
        return _load(x[image], dtype)
    return _load(x[image, group], dtype)


def _of_block(x: Tensor, block: slice) -> Tensor:
    if x.shape[0] == 1:
        return x.expand(block.stop - block.start, -1, -1)
    return x[block]


def _is_same(query: Tensor, value: Tensor) -> bool:
    """Whether two tensors are one: FullyAttentional's query and value are, so gather them once."""
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
    """softmax(scale · query · keyᵀ) of one block, written into the front of `buffer`."""
    count, tokens, memory = query.shape[0], query.shape[1], key.shape[1]
    weights = buffer[: count * tokens * memory].view(count, tokens, memory)
    torch.bmm(query, key.mT, out=weights)
    if scale != 1.0:
        weights.mul_(scale)
    return torch.softmax(weights, -1, out=weights)


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As `attend`, without autograd and on any device."""
    dtype = work_dtype(query.dtype)
    out = _like_query(query, value.shape[-1])
    plan, same = _Plan(query, key), _is_same(query, value)
    buffer = torch.empty(plan.block_numel, dtype=dtype, device=query.device)
    for image in range(query.shape[0]):
        for group in plan.groups():
            queries = _of_group(query, image, group, dtype)
            keys = _of_group(key, image, group, dtype)
            values = queries if same else _of_group(value, image, group, dtype)
            result = queries.new_empty(queries.shape[0], plan.tokens, value.shape[-1])
            for block in plan.blocks(group):
                for tokens in plan.token_ranges():
                    weights = _scores(queries[block, tokens], _of_block(keys, block), scale, buffer)
                    # A block of whole slices is contiguous, which the batched product asks for.
                    torch.bmm(weights, _of_block(values, block), out=result[block, tokens])
            out[image, group].copy_(result)
    return out


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value of `forward`, on any device."""
    dtype = work_dtype(query.dtype)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    plan, same = _Plan(query, key), _is_same(query, value)
    buffer = torch.empty(plan.block_numel, dtype=dtype, device=query.device)
    grad_buffer = torch.empty_like(buffer)
    for image in range(query.shape[0]):
        shared_key = key.new_zeros(1, *key.shape[2:], dtype=dtype)
        shared_value = value.new_zeros(1, *value.shape[2:], dtype=dtype)
        for group in plan.groups():
            count = group.stop - group.start
            queries = _of_group(query, image, group, dtype)
            keys = _of_group(key, image, group, dtype)
            values = queries if same else _of_group(value, image, group, dtype)
            grads = _of_group(grad, image, group, dtype)
            to_query = queries.new_empty(queries.shape)
            to_key = (
                shared_key if key.shape[1] == 1 else shared_key.new_zeros(count, *key.shape[2:])
            )
            to_value = (
                shared_value
                if value.shape[1] == 1
                else shared_value.new_zeros(count, *value.shape[2:])
            )
            for block in plan.blocks(group):
                for tokens in plan.token_ranges():
                    block_query, block_grad = queries[block, tokens], grads[block, tokens]
                    block_key, block_value = _of_block(keys, block), _of_block(values, block)
                    weights = _scores(block_query, block_key, scale, buffer)
                    grad_scores = grad_buffer[: weights.numel()].view(weights.shape)
                    torch.bmm(block_grad, block_value.mT, out=grad_scores)
                    torch.ops.aten._softmax_backward_data.out(
                        grad_scores, weights, -1, dtype, grad_input=grad_scores
                    )
                    if scale != 1.0:
                        grad_scores.mul_(scale)
                    torch.bmm(grad_scores, block_key, out=to_query[block, tokens])
                    _accumulate(to_key, block, grad_scores.mT, block_query)
                    _accumulate(to_value, block, weights.mT, block_grad)
            grad_query[image, group].copy_(to_query)
            if key.shape[1] != 1:
                grad_key[image, group].copy_(to_key)
            if value.shape[1] != 1:
                grad_value[image, group].copy_(to_value)
        if key.shape[1] == 1:
            grad_key[image].copy_(shared_key)
        if value.shape[1] == 1:
            grad_value[image].copy_(shared_value)
    return grad_query, grad_key, grad_value


def _accumulate(total: Tensor, block: slice, left: Tensor, right: Tensor) -> None:
    """Add left · right (n, a, b) to the block's slices of `total`, or their sum to a shared one."""
    if total.shape[0] == 1:
        total[0].addbmm_(left, right)
    else:
        total[block].baddbmm_(left, right)


def _empty_result(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return _like_query(query, value.shape[-1])


def _workspace(a: BranchSizes, setting: Setting) -> Workspace:
    size, work, half = setting.size, setting.work_size, setting.half
    batch, slices = a.query[:2]
    _, _, gathered_slices, block_numel = _plan(slices, a.query[2], a.key[2])
    group = minimum(gathered_slices, slices)
    # From the second group on, a tensor is there twice while it is made again.
    twice = at_least(slices, 2 * group)
    several = less(1, batch) * at_least(group, slices)
    again = where(maximum(twice, several), group, slices - group)
    buffer = block_numel * work

    def gathered(shape: tuple[Size, ...]) -> Size:
        """Bytes of the copy of one slice."""
        return prod(shape[2:]) * work * (half if a.in_place else 1)

    query, grad = gathered(a.query), gathered(a.out)
    value = 0 if a.value_is_query else gathered(a.value)
    # Keys are cast, but never gathered: they are one slice, or lie so that BLAS reads them.
    key = half * prod(a.key[2:]) * work
    # A cast keeps the strides, and is copied once more.
    casting = 1 if a.contiguous else 1 + half
    result = prod(a.out[2:]) * work
    output = prod(a.out) * size
    one_slice = at_least(1, slices)
    # The value's name holds the old query while the key is cast again.
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


attend = operators.register(
    "attend_chunked",
    forward,
    backward,
    _empty_result,
    ("query", "key", "value"),
    flops.attend,
    flops.attend_backward,
)

BACKEND = Backend(
    name="chunked",
    summary="a few slices of the map at a time, in reused buffers, by PyTorch's matrix products",
    attend={ScoreFunction.SOFTMAX: attend},
    workspace=_workspace,
    own_operators=True,
    devices=frozenset({"cpu"}),
)
