"""Which backend runs, why the others do not, and how a user overrides the choice.

The rule, on every device: build the similarity map only where there is one slice and its map holds
fewer elements than the tensors that it relates; otherwise fuse. The maps of several slices, as of
FullyAttentional's columns and rows, are never worth building: every slice has to be copied first,
and that alone costs more than a small map saves. Among the backends that fuse, the first of
`FUSED_SLICES` or `FUSED_SLICE` that can run the inputs does. In a program that `torch.export`
writes it is the first that is made of PyTorch's own operators, so that the program can be loaded
without this package.

An override is looked for in this order: the `backend` context manager, the layer's or function's
own `backend=` argument, the environment variable FULLATTN_BACKEND, and then the rule.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fullattn.attention import chunked, linear, native, reference, sdpa, triton
from fullattn.attention.backend import AttentionInputs, Backend, asked, statically_true

__all__ = [
    "BACKENDS",
    "FUSED_SLICE",
    "FUSED_SLICES",
    "BackendError",
    "backend",
    "backend_names",
    "by_name",
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
# Those that fuse several slices, and one, the best first; a new backend is one more name in these
# lists. On Zen 4, at 512x97x97, `sdpa` takes 0.6 of the time of `chunked` for one slice of
# positions; for columns and rows the two take the same time, and `sdpa` half as much memory again
# in training.
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
# A module global and not a context variable: torch.compile guards on it and retraces when it moves.
_override: str | None = None
_from_environment: str | None = os.environ.get(_ENVIRONMENT) or None


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the inputs; the message holds all reasons."""


def backend_names() -> tuple[str, ...]:
    """Names of all backends."""
    return tuple(_BY_NAME)


def by_name(name: str) -> Backend:
    """Return the backend of a name."""
    return _BY_NAME[name]


def check_name(name: str | None, source: str = "backend") -> str | None:
    """Return a backend's name unchanged if it is one.

    Args:
        name: a backend's name, or None for the automatic choice.
        source: what the error message calls the place that the name came from.

    Returns:
        `name`.

    Raises:
        ValueError: no backend has that name.
    """
    if name is not None and name not in _BY_NAME:
        raise ValueError(f"{source} must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every layer of this package on one backend, inside a `with` block.

    The override holds for the whole process, not for one thread, and wins over a layer's own
    `backend=` and over FULLATTN_BACKEND. Backward passes run on the backend of their forward.

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
    global _override
    previous, _override = _override, check_name(name)
    try:
        yield
    finally:
        _override = previous


def fused(inputs: AttentionInputs) -> tuple[Backend, ...]:
    """List the fused backends, the best first, including those that cannot run these inputs."""
    return FUSED_SLICES if inputs.sliced else FUSED_SLICE


def worth_building(inputs: AttentionInputs) -> bool:
    """Whether the similarity map is worth building; False where it depends on symbolic sizes."""
    return not inputs.sliced and statically_true(inputs.map_numel < inputs.token_numel)


def forced(requested: str | None) -> Backend | None:
    """Return the backend chosen by name: by the context, the caller or the environment.

    Args:
        requested: the layer's own `backend=`.

    Returns:
        The backend; None for the automatic choice.
    """
    name = _override or requested
    if name is None and _from_environment is not None:
        name = check_name(_from_environment, _ENVIRONMENT)
    return None if name is None else _BY_NAME[name]


def choose(inputs: AttentionInputs, requested: str | None = None) -> Backend:
    """Choose the backend that runs inputs.

    Args:
        inputs: of the call.
        requested: the layer's own `backend=`; None for the automatic choice.

    Returns:
        The backend.

    Raises:
        BackendError: the backend asked for cannot run the inputs.
        ValueError: FULLATTN_BACKEND does not name a backend.
    """
    named = forced(requested)
    if named is not None:
        if named.reasons_against(inputs):
            raise _refused(named, inputs)
        return named
    if not worth_building(inputs):
        exporting = torch.compiler.is_exporting()
        for candidate in fused(inputs):
            if exporting and candidate.own_operators:
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
        f"backend {named.name!r} cannot run {asked(inputs)} on {inputs.device} in "
        f"{str(inputs.dtype).removeprefix('torch.')}: "
        f"{', '.join(named.reasons_against(inputs))} ({others})"
    )


def explain(inputs: AttentionInputs, requested: str | None = None) -> list[tuple[Backend, str]]:
    """Say of every backend whether it runs inputs, and why or why not.

    Args:
        inputs: of the call.
        requested: the layer's own `backend=`.

    Returns:
        (backend, sentence) for every backend; exactly one sentence starts with "runs:" unless a
        backend that cannot run is named.
    """
    named = forced(requested)
    small = worth_building(inputs)
    chosen = named or choose(inputs, requested)
    sizes = f"map {inputs.map_numel:,} elements, tensors {inputs.token_numel:,}"
    sentences = []
    for entry in BACKENDS:
        reasons = entry.reasons_against(inputs)
        if reasons:
            sentence = "cannot run: " + ", ".join(reasons)
        elif entry is chosen and named is not None:
            sentence = "runs: asked for by name"
        elif entry is chosen and entry.builds_map and small:
            sentence = f"runs: the map is smaller than the tensors it relates ({sizes})"
        elif entry is chosen and entry.builds_map:
            sentence = "runs: no backend that fuses can"
        elif entry is chosen:
            sentence = f"runs: the first that can, and the map is not worth building ({sizes})"
        elif named is not None:
            sentence = f"can run, but {named.name} is asked for by name"
        elif small:
            sentence = f"can run, but the map is smaller than the tensors it relates ({sizes})"
        elif entry.builds_map:
            sentence = f"can run, but the map is not worth building ({sizes})"
        else:
            sentence = f"can run, but {chosen.name} comes first"
        sentences.append((entry, sentence))
    return sentences
