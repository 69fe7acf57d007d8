"""Choose the backend for a call, and explain the choice.

The rule, on every device: build the similarity map if there is one slice and its map has fewer
elements than its query and key; otherwise use a fused backend. The maps of several slices, such as
FullyAttentional's columns and rows, are never built: every slice would have to be copied first,
which costs more than a small map saves. The fused backend is the first of `FUSED_SLICES` or
`FUSED_SLICE` that can run the inputs. In `torch.export`, `torch.jit.trace` and `torch.onnx.export`
it is the first that uses PyTorch's own operators alone, so that the program can be loaded without
this package.

The rule is overridden by, in this order, the `backend` context manager, the `backend=` argument of
the layer or function, and the environment variable FULLATTN_BACKEND. In torch.func transforms and
forward-mode differentiation the definition runs, which alone PyTorch can transform.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fullattn._versions import local
from fullattn.attention import chunked, linear, native, reference, sdpa, triton
from fullattn.attention.backend import AttentionInputs, Backend, described
from fullattn.attention.tracing import (
    is_exported,
    is_jit_traced,
    is_transformed,
    statically_true,
)

__all__ = [
    "BACKENDS",
    "FUSED_SLICE",
    "FUSED_SLICES",
    "BackendError",
    "backend",
    "backend_names",
    "check_name",
    "choose",
    "explain",
    "forced",
    "fused",
    "worth_building",
]

BACKENDS: tuple[Backend, ...] = (
    triton.BACKEND,
    native.BACKEND,
    chunked.BACKEND,
    sdpa.BACKEND,
    linear.BACKEND,
    reference.BACKEND,
)
# Fused backends for several slices and for one slice, the best first. On Zen 4, at 512x97x97,
# `sdpa` takes 0.6 of the time of `chunked` for one slice of positions; for columns and rows the two
# take the same time, and `sdpa` uses 1.5 times as much memory in training.
FUSED_SLICES: tuple[Backend, ...] = (
    native.BACKEND,
    chunked.BACKEND,
    triton.BACKEND,
    sdpa.BACKEND,
    linear.BACKEND,
)
FUSED_SLICE: tuple[Backend, ...] = (sdpa.BACKEND, chunked.BACKEND, linear.BACKEND)
_BY_NAME = {entry.name: entry for entry in BACKENDS}

_ENVIRONMENT = "FULLATTN_BACKEND"
# The override of `backend` in this thread or task.
_override: ContextVar[str | None] = ContextVar("fullattn_backend", default=None)


class _Overrides(local):  # type: ignore[misc]
    """The overrides of this thread, for torch.compile, which cannot trace a context variable.

    Attributes:
        name: of the last one that was entered; torch.compile guards on it in every thread.
        entered: all of them, which tasks may leave in another order.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.entered: list[list[str | None]] = []


_overrides = _Overrides()
_from_environment: str | None = os.environ.get(_ENVIRONMENT) or None


class BackendError(RuntimeError):
    """Raised if a backend chosen by name cannot run the inputs; the message lists all reasons."""


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends."""
    return tuple(_BY_NAME)


def check_name(name: str | None, source: str = "backend") -> str | None:
    """Return `name` if it is None or names a backend; otherwise raise ValueError with `source`."""
    if name is not None and name not in backend_names():
        raise ValueError(f"{source} must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every layer of this package on one backend inside a `with` block.

    The override holds for the thread or the asyncio task that enters the block, and wins over a
    layer's own `backend=` and over FULLATTN_BACKEND. Backward passes run on the backend of their
    forward. Compiled code follows the override of its thread that was entered last.

    Args:
        name: "triton", "native", "chunked", "sdpa", "linear" or "reference"; None for the
            automatic choice.

    Yields:
        Nothing.

    Raises:
        ValueError: no backend has that name.

    Example:
        >>> import torch, fullattn
        >>> layer = fullattn.FullyAttentional(8, project=False)
        >>> with fullattn.backend("reference"):
        ...     y = layer(torch.randn(1, 8, 5, 6))
    """
    token = _override.set(check_name(name))
    entry = [name]
    _overrides.entered.append(entry)
    _overrides.name = name
    try:
        yield
    finally:
        _override.reset(token)
        _overrides.entered[:] = [each for each in _overrides.entered if each is not entry]
        _overrides.name = _overrides.entered[-1][0] if _overrides.entered else None


def fused(inputs: AttentionInputs) -> tuple[Backend, ...]:
    """Return the fused backends, the best first, including those that cannot run the inputs."""
    return FUSED_SLICES if inputs.sliced else FUSED_SLICE


def worth_building(inputs: AttentionInputs) -> bool:
    """Return whether to build the similarity map; False if that depends on symbolic sizes."""
    return not inputs.sliced and statically_true(inputs.map_numel < inputs.token_numel)


def forced(requested: str | None) -> Backend | None:
    """Return the backend that context, `backend=` or environment name; None for none."""
    compiling = torch.compiler.is_compiling()
    name = (_overrides.name if compiling else _override.get()) or requested
    if name is None and _from_environment is not None:
        name = check_name(_from_environment, _ENVIRONMENT)
    return None if name is None else _BY_NAME[name]


def choose(inputs: AttentionInputs, requested: str | None = None) -> Backend:
    """Choose the backend for a call.

    Args:
        inputs: properties of the call.
        requested: the `backend=` of the layer or function; None for the automatic choice.

    Returns:
        The backend.

    Raises:
        BackendError: the named backend cannot run the inputs.
        ValueError: FULLATTN_BACKEND does not name a backend.
    """
    named = forced(requested)
    if named is not None:
        if named.reasons_against(inputs):
            raise _refused(named, inputs)
        # A traced program is made to be loaded elsewhere, whatever was chosen for this process.
        if not (named.own_operators and is_jit_traced()) and not is_transformed():
            return named
    if is_transformed():
        return reference.BACKEND
    if not worth_building(inputs):
        exported = is_exported()
        for candidate in fused(inputs):
            if exported and candidate.own_operators:
                continue
            if not candidate.reasons_against(inputs):
                return candidate
    return reference.BACKEND


def _refused(named: Backend, inputs: AttentionInputs) -> BackendError:
    others = "; ".join(
        f"{other.name}: {', '.join(other.reasons_against(inputs)) or 'can run it'}"
        for other in BACKENDS
        if other is not named
    )
    return BackendError(
        f"backend {named.name!r} cannot run {described(inputs)} on {inputs.device} in "
        f"{str(inputs.dtype).removeprefix('torch.')}: "
        f"{', '.join(named.reasons_against(inputs))} ({others})"
    )


def explain(inputs: AttentionInputs, requested: str | None = None) -> list[tuple[Backend, str]]:
    """Explain for every backend whether it runs the inputs, and why or why not.

    Returns:
        (backend, sentence) for every backend; exactly one sentence starts with "runs:" unless a
        backend that cannot run is named.
    """
    named = forced(requested)
    chosen = named or choose(inputs, requested)
    sizes = f"(map {inputs.map_numel:,} elements, tensors {inputs.token_numel:,})"
    if named:
        runs, loses = "chosen by name", f"{named.name} is chosen by name"
    elif worth_building(inputs):
        runs = loses = f"the map is smaller than the tensors it relates {sizes}"
    elif chosen.builds_map:
        runs = loses = "no fused backend can"
    else:
        runs = f"the first that can, and the map is not worth building {sizes}"
        loses = f"{chosen.name} comes first"
    sentences = []
    for entry in BACKENDS:
        if reasons := entry.reasons_against(inputs):
            sentence = "cannot run: " + ", ".join(reasons)
        elif entry is chosen:
            sentence = f"runs: {runs}"
        elif entry.builds_map and not named:
            sentence = f"can run, but the map is not worth building {sizes}"
        else:
            sentence = f"can run, but {loses}"
        sentences.append((entry, sentence))
    return sentences
