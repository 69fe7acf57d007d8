"""The primitive under all three layers, and the backends that run it.

    attend(query, key, value, scale)
    query (B, S, N, D)   key (B, S or 1, M, D)   value (B, S or 1, M, E)   ->   (B, S, N, E)

S independent slices of N query tokens and M key tokens; a slice axis of 1 is shared by all slices.
Under autocast the inputs are cast to the autocast dtype, as PyTorch's own attention does; scores
and softmax are computed in float32 at least, whatever the dtype.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fullattn.attention import reference
from fullattn.attention.backend import Backend, Kind, Problem
from fullattn.attention.dispatch import BackendError, backend, backend_names, choose
from fullattn.attention.residual import add_to
from fullattn.reshape import from_columns, from_rows, to_columns, to_rows

__all__ = [
    "Backend",
    "BackendError",
    "Kind",
    "Problem",
    "add_to",
    "attend",
    "attend_columns_and_rows",
    "backend",
    "backend_names",
    "choose",
    "is_autocast_enabled",
    "similarity",
]


def is_autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; never for "meta", which has none."""
    # Not torch.amp.is_autocast_available, which torch.compile cannot trace before PyTorch 2.13.
    return device != "meta" and torch.is_autocast_enabled(device)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    # As autocast itself does, leave float64 alone.
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _autocast_off(x: Tensor) -> AbstractContextManager[None]:
    # The casts are made; inside, autocast would take the scores out of float32. Where it is off
    # already, saying so again would only stand in the way of an export.
    if is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    kind: Kind = Kind.SOFTMAX,
    backend: str | None = None,
) -> Tensor:
    """Attention in independent slices: softmax(scale · query · keyᵀ) · value.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        value: (B, S or 1, M, E).
        scale: factor on the scores, of either sign.
        kind: softmax attention, or one of the forms without softmax.
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
    query, key, value = _as_autocast(query, key, value)
    chosen = choose(Problem.of(kind, query, key), backend)
    with _autocast_off(query):
        return chosen.run[kind](query, key, value, scale)


def attend_columns_and_rows(
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    scale: float = 1.0,
    *,
    gamma: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The two branches of the fully attentional layer, added, and its residual.

    Equivalent to `attend` over the columns of x plus `attend` over its rows, with x as query and
    value, and to that times gamma plus x where there is a gamma. A backend may run both branches
    in one pass and add the residual in it, which saves copies of x.

    Args:
        x: feature map, (B, C, H, W).
        column_key: (B, C, H), shared by all columns.
        row_key: (B, C, W), shared by all rows.
        scale: factor on the scores, of either sign.
        gamma: factor of the attention, one number; None for no factor and no residual.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, C, H, W).

    Raises:
        BackendError: the backend asked for cannot run this.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 4, 5)
        >>> attend_columns_and_rows(x, torch.randn(2, 3, 4), torch.randn(2, 3, 5)).shape
        torch.Size([2, 3, 4, 5])
    """
    given = x
    x, column_key, row_key = _as_autocast(x, column_key, row_key)
    chosen = choose(Problem.of_columns_and_rows(x), backend)
    run = chosen.run.get(Kind.COLUMNS_AND_ROWS)
    with _autocast_off(x):
        if run is not None and chosen.adds_residual and _is_addable(given, x, gamma):
            return run(x, column_key, row_key, scale, gamma)
        if run is not None:
            attended = run(x, column_key, row_key, scale)
        else:
            attended = _one_after_the_other(chosen, x, column_key, row_key, scale)
    return add_to(given, gamma, attended)


def _is_addable(given: Tensor, x: Tensor, gamma: Tensor | None) -> bool:
    """Whether a backend can add the residual: x as it was given, before autocast's cast."""
    if gamma is None:
        return True
    return x.dtype == given.dtype and gamma.numel() == 1 and gamma.device == x.device


def _one_after_the_other(
    chosen: Backend, x: Tensor, column_key: Tensor, row_key: Tensor, scale: float
) -> Tensor:
    run = chosen.run[Kind.SOFTMAX]
    columns, rows = to_columns(x), to_rows(x)
    attended_columns = run(columns, column_key.unsqueeze(1), columns, scale)
    attended_rows = run(rows, row_key.unsqueeze(1), rows, scale)
    return from_columns(attended_columns) + from_rows(attended_rows)


def similarity(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """The similarity map itself: softmax(scale · query · keyᵀ).

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        scale: factor on the scores, of either sign.

    Returns:
        (B, S, N, M), in float32 for half-precision inputs; every row sums to 1.

    Example:
        >>> import torch
        >>> similarity(torch.randn(2, 5, 7, 3), torch.randn(2, 1, 4, 3)).shape
        torch.Size([2, 5, 7, 4])
    """
    query, key = _as_autocast(query, key)
    with _autocast_off(query):
        return reference.similarity(query, key, scale)
