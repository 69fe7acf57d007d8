"""One call for every attention over a feature map, and the backends that run it.

A layer makes an `AttentionCall`: an operation, which has a definition and the same as branches, and
its tensors. `run` passes it to the backend that `fullattn.attention.dispatch` chooses: `reference`
runs the definition, others the whole operation in one pass, or the branches one after the other
with the primitive of all of them:

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
)
from fullattn.attention.dispatch import BackendError, backend, backend_names, choose
from fullattn.attention.residual import scaled_residual

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
    """Whether autocast is on for a device type; never for "meta", which has none."""
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace before PyTorch 2.13.
    return device != "meta" and torch.is_autocast_enabled(device)


def _cast(device: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors in the autocast dtype; as autocast itself does, leave float64 alone."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def run(
    call: AttentionCall,
    x: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, bool]:
    """Run a call on the backend that is chosen for it.

    Some backends add the residual in the same pass. For the others the caller adds it with
    `scaled_residual`, after the queries, keys and values of the call are freed.

    Args:
        call: the operation and its tensors.
        x: what is to be added, (B, C, H, W); None without gamma.
        gamma: factor of the attention, one number; None for no factor and nothing to add.
        backend: name of the backend; None for the automatic choice.

    Returns:
        A feature map, and whether it is gamma · attended + x already.

    Raises:
        BackendError: the backend asked for cannot run this.
    """
    operation, tensors, scale, score = call
    device = tensors[0].device.type
    if is_autocast_enabled(device):
        # The casts are made here; inside, autocast would take the scores out of float32.
        with torch.autocast(device, enabled=False):
            return run(call._replace(tensors=_cast(device, tensors)), x, gamma, backend=backend)
    chosen = choose(AttentionInputs.of(call), backend)
    if chosen.builds_map:
        return reference.attended(call), False
    if score is ScoreFunction.SOFTMAX and operation.name in chosen.operations:
        whole = chosen.operations[operation.name]
        if gamma is not None and _adds_residual(chosen, tensors[0], x, gamma):
            return whole(*tensors, scale, gamma), True
        return whole(*tensors, scale), False
    attend = chosen.attend[score]
    first, *others = call.branches
    attended = first.put_back(attend(*first.tokens(), scale))
    for branch in others:
        attended = attended + branch.put_back(attend(*branch.tokens(), scale))
    return attended, False


def _adds_residual(chosen: Backend, query: Tensor, x: Tensor | None, gamma: Tensor) -> bool:
    """Whether a backend can add the residual: the query as it was given, before autocast's cast."""
    when = chosen.adds_residual
    if when == "inference" and (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return False
    if when == "never" or gamma.numel() != 1 or gamma.device != query.device:
        return False
    return x is not None and _is_same(x, query)


def _is_same(x: Tensor, query: Tensor) -> bool:
    """Whether the query is x itself, or a view of all of it, as `functional.axial_means` gives."""
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
    """Attention in independent slices: softmax(scale · query · keyᵀ) · value.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        value: (B, S or 1, M, E).
        scale: factor on the scores, of either sign.
        score: softmax attention, or one of the forms without softmax.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, S, N, E).

    Raises:
        BackendError: the backend asked for cannot run this.

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
    chosen = choose(AttentionInputs.of_tokens(score, query, key), backend)
    return chosen.attend[score](query, key, value, scale)
