"""Attention over feature maps, and the backends that compute it.

A layer returns an `AttentionCall`: an operation and its tensors. `run` passes it to the backend
that `fullattn.attention.dispatch` chooses. `reference` runs the definition of the operation; other
backends run the whole operation in one pass, or its branches one after the other, each with

    attend(query, key, value, scale)
    query (B, S, N, D)   key (B, S or 1, M, D)   value (B, S or 1, M, E)   ->   (B, S, N, E)

S independent slices of N query tokens and M key tokens; a slice axis of 1 is shared by all slices.
Under autocast the tensors are cast to the autocast dtype, as PyTorch's own attention does; scores
and softmax are computed in float32 at least, whatever the dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fullattn.attention import reference
from fullattn.attention.backend import (
    AttentionCall,
    AttentionInputs,
    Backend,
    Branch,
    BranchSizes,
    Operation,
    ScoreFunction,
    branches_of,
)
from fullattn.attention.dispatch import BackendError, backend, backend_names, choose
from fullattn.attention.residual import scaled_residual
from fullattn.attention.tracing import statically_true, with_plain_sizes

__all__ = [
    "AttentionCall",
    "AttentionInputs",
    "Backend",
    "BackendError",
    "Branch",
    "BranchSizes",
    "Operation",
    "ScoreFunction",
    "attend",
    "backend",
    "backend_names",
    "choose",
    "is_autocast_enabled",
    "maps",
    "run",
    "scaled_residual",
]


def is_autocast_enabled(device: str) -> bool:
    """Return whether autocast is on for a device type; False for "meta", which has no autocast."""
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace before PyTorch 2.13.
    return device != "meta" and torch.is_autocast_enabled(device)


def _cast(device: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast tensors to the autocast dtype, except float64, which autocast leaves as it is."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def run(
    call: AttentionCall,
    x: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, bool]:
    """Run a call on a backend.

    Some backends add the residual in the same pass. For the others the caller adds it with
    `scaled_residual`, after the queries, keys and values of the call are freed.

    Args:
        call: the operation and its tensors.
        x: the residual, (B, C, H, W); None without gamma.
        gamma: factor of the attention, one number; None for no factor and no residual.
        backend: name of the backend; None for the automatic choice.

    Returns:
        The attended feature map or gamma · attended + x; and whether it is the latter.

    Raises:
        BackendError: the named backend cannot run the call.
    """
    operation, tensors, scale, score = call
    device = tensors[0].device.type
    if is_autocast_enabled(device):
        # Cast once; inside the backend, autocast would compute the scores in half precision.
        with torch.autocast(device, enabled=False):
            call = AttentionCall(operation, _cast(device, tensors), scale, score)
            return run(call, x, gamma, backend=backend)
    with with_plain_sizes():
        inputs = AttentionInputs.of(call)
    chosen = choose(inputs, backend)
    if chosen.builds_map:
        return reference.attended(call), False
    if score is ScoreFunction.SOFTMAX and operation.name in chosen.operations:
        whole = chosen.operations[operation.name]
        if gamma is not None and _adds_residual(chosen, tensors[0], x, gamma):
            return whole(*tensors, scale, gamma), True
        return whole(*tensors, scale), False
    attend = chosen.attend[score]
    first, *others = branches_of(call)
    attended = first.put_back(attend(*first.tokens(), scale))
    for branch in others:
        attended = attended + branch.put_back(attend(*branch.tokens(), scale))
    return attended, False


def _adds_residual(chosen: Backend, query: Tensor, x: Tensor | None, gamma: Tensor) -> bool:
    """Return whether a backend can add the residual x, which has to be the query itself."""
    when = chosen.adds_residual
    if when == "inference" and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return False
    if when == "never" or gamma.numel() != 1 or gamma.device != query.device:
        return False
    return x is not None and _is_same(x, query)


def _is_same(x: Tensor, query: Tensor) -> bool:
    """Return whether the query is x, or a view of all of it, as of `functional.axial_means`."""
    if query is x:
        return True
    base = query._base
    return (
        base is not None
        and (base is x or base is x._base)
        and query.storage_offset() == x.storage_offset()
        and query.shape == x.shape
        and query.stride() == x.stride()
    )


def maps(call: AttentionCall) -> Any:
    """Compute the similarity maps of a call by its definition.

    Args:
        call: the operation and its tensors.

    Returns:
        A tensor, or a named tuple with one for each branch; in float32 for half precision.
    """
    device = call.tensors[0].device.type
    if not is_autocast_enabled(device):
        return reference.maps(call)
    with torch.autocast(device, enabled=False):
        return reference.maps(call._replace(tensors=_cast(device, call.tensors)))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
    backend: str | None = None,
) -> Tensor:
    """Compute attention in independent slices: softmax(scale · query · keyᵀ) · value.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        value: (B, S or 1, M, E).
        scale: factor on the scores, of either sign.
        score: how scores become weights.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, S, N, E).

    Raises:
        BackendError: the named backend cannot run this.

    Example:
        >>> import torch
        >>> query, key = torch.randn(2, 5, 7, 3), torch.randn(2, 1, 4, 3)
        >>> attend(query, key, key).shape
        torch.Size([2, 5, 7, 3])
    """
    device = query.device.type
    if is_autocast_enabled(device):
        query, key, value = _cast(device, (query, key, value))
        with torch.autocast(device, enabled=False):
            return attend(query, key, value, scale, score=score, backend=backend)
    slices, tokens, features = query.shape[1:]
    sliced = not statically_true(slices == 1)
    sizes = (slices, tokens, key.shape[2], features)
    chosen = choose(
        AttentionInputs.of_sizes("", score, device, query.dtype, sliced, sizes), backend
    )
    return chosen.attend[score](query, key, value, scale)
