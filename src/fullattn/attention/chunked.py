"""Attention on the CPU, a few slices of the map at a time.

A block of the map that fits a core's cache is built, normalised, multiplied with the values and
thrown away; its buffer is used again for the next block. Backward builds each block again from the
saved query and key. Nothing of map size is ever allocated, and every product is one call of
PyTorch's matrix product, which the CPU's BLAS runs near its peak.

Both directions are operators (`fullattn::attend_chunked`): `torch.compile` sees a call, not a loop.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fullattn.attention import flops, operators
from fullattn.attention.backend import Backend, Kind

__all__ = ["BACKEND", "attend", "backward", "forward"]

# Numbers of the map in one block: 2 MB of float32, which two cores hold in their second-level
# caches. Measured on Zen 4 at 1x512x97x97 and 4x128x64x64: flat between 1 and 4 MB.
_BLOCK = 2**19
# Slices gathered at a time where the features are strided: 16 float32 fill a cache line, so that
# every line of the feature map is read once.
_GATHER = 16


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _suits_blas(x: Tensor) -> bool:
    """Whether each slice of x (n, tokens, features) is a matrix that BLAS reads in place."""
    rows, columns = x.stride()[-2:]
    return (columns == 1 and rows >= x.shape[-1]) or (rows == 1 and columns >= x.shape[-2])


def _load(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The slices x (n, tokens, features) if BLAS can read them, otherwise a contiguous copy."""
    return x if x.dtype == dtype and _suits_blas(x) else x.to(dtype).contiguous()


class _Plan:
    """How the slices and tokens of one call are cut into blocks of at most `_BLOCK` map numbers."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        _, self.slices, self.tokens, _ = query.shape
        slice_numbers = self.tokens * key.shape[2]
        self.at_once = max(1, _BLOCK // max(1, slice_numbers))
        self.rows = self.tokens
        if slice_numbers > 2 * _BLOCK:
            self.rows = max(64, _BLOCK // key.shape[2])
        self.gathered = max(_GATHER, self.at_once)
        self.block_numbers = min(self.at_once, self.slices) * self.rows * key.shape[2]

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
    """The slices of one group (n, tokens, features), or the shared one with n = 1."""
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
    """An empty (B, S, N, features) in the query's memory layout where the two have one shape."""
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
    dtype = _work_dtype(query.dtype)
    out = _like_query(query, value.shape[-1])
    plan, same = _Plan(query, key), _is_same(query, value)
    buffer = torch.empty(plan.block_numbers, dtype=dtype, device=query.device)
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
    """The gradients of query, key and value of `forward`, on any device."""
    dtype = _work_dtype(query.dtype)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    plan, same = _Plan(query, key), _is_same(query, value)
    buffer = torch.empty(plan.block_numbers, dtype=dtype, device=query.device)
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


_operator = operators.register(
    "attend_chunked",
    forward,
    backward,
    _empty_result,
    ("query", "key", "value"),
    flops.attend,
    flops.attend_backward,
)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale · query · keyᵀ) · value, block by block.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        value: (B, S or 1, M, E).
        scale: factor on the scores, of either sign.

    Returns:
        (B, S, N, E) in the query's dtype, and in its memory layout where E is D.
    """
    result: Tensor = _operator(query, key, value, scale)
    return result


BACKEND = Backend(
    name="chunked",
    summary="a few slices of the map at a time, in reused buffers, by PyTorch's matrix products",
    run={Kind.SOFTMAX: attend},
    own_operators=True,
    devices=frozenset({"cpu"}),
)
