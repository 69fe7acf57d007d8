"""Which backend runs, why the others do not, and how a user overrides the choice.

The rule, on every device: build the similarity map only where it holds fewer numbers than the
tensors that it relates; otherwise fuse. FullyAttentional's columns and rows are always fused: to
build their maps every slice has to be copied first, and that alone costs more than a small map
saves. Among the backends that fuse, the first in `FUSED` that can run the problem does. In a
program that `torch.export` writes it is the first that is made of PyTorch's own operators, so that
the program can be loaded without this package.

An override is looked for in this order: the `backend` context manager, the layer's or function's
own `backend=` argument, the environment variable FULLATTN_BACKEND, and then the rule.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fullattn.attention import chunked, native, reassociated, reference, sdpa, triton
from fullattn.attention.backend import Backend, Kind, Problem, known

__all__ = [
    "BACKENDS",
    "FUSED",
    "BackendError",
    "backend",
    "backend_names",
    "by_name",
    "check_name",
    "choose",
]

BACKENDS: tuple[Backend, ...] = (
    triton.BACKEND,
    native.BACKEND,
    chunked.BACKEND,
    sdpa.BACKEND,
    reassociated.BACKEND,
    reference.BACKEND,
)
# Those that fuse, the best first; a new backend is one more name in each of these lists. On Zen 4,
# at 512x97x97, `sdpa` takes 0.6 of the time of `chunked` for positions; for columns and rows the
# two take the same time, and `sdpa` half as much memory again in training.
FUSED: Mapping[Kind, tuple[Backend, ...]] = {
    Kind.SOFTMAX: (sdpa.BACKEND, chunked.BACKEND),
    Kind.COLUMNS_AND_ROWS: (native.BACKEND, chunked.BACKEND, triton.BACKEND, sdpa.BACKEND),
    Kind.DOT_PRODUCT: (reassociated.BACKEND,),
    Kind.CONCATENATION: (),
}
_BY_NAME = {entry.name: entry for entry in BACKENDS}

_ENVIRONMENT = "FULLATTN_BACKEND"
# A module global and not a context variable: torch.compile guards on it and retraces when it moves.
_override: str | None = None
_from_environment: str | None = os.environ.get(_ENVIRONMENT) or None


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the problem; the message holds all reasons."""


def backend_names() -> tuple[str, ...]:
    """Names of all backends."""
    return tuple(_BY_NAME)


def by_name(name: str) -> Backend:
    """The backend of a name."""
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
        name: "triton", "native", "chunked", "sdpa", "reassociated" or "reference"; None for the
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


def _worth_building(problem: Problem) -> bool:
    if problem.kind is Kind.COLUMNS_AND_ROWS:
        return False
    # Where it is not known for every size of a traced program, fuse.
    return known(problem.map_numbers < problem.tensor_numbers)


def _forced(requested: str | None) -> Backend | None:
    name = _override or requested
    if name is None and _from_environment is not None:
        name = check_name(_from_environment, _ENVIRONMENT)
    return None if name is None else _BY_NAME[name]


def choose(problem: Problem, requested: str | None = None) -> Backend:
    """The backend that runs a problem.

    Args:
        problem: what is asked.
        requested: the layer's own `backend=`; None for the automatic choice.

    Returns:
        The backend.

    Raises:
        BackendError: the backend asked for cannot run the problem.
        ValueError: FULLATTN_BACKEND does not name a backend.
    """
    forced = _forced(requested)
    if forced is not None:
        reasons = forced.reasons_against(problem)
        if reasons:
            others = "; ".join(
                f"{other.name}: {', '.join(other.reasons_against(problem)) or 'can run it'}"
                for other in BACKENDS
                if other is not forced
            )
            raise BackendError(
                f"backend {forced.name!r} cannot run {problem.kind.value} on {problem.device} in "
                f"{str(problem.dtype).removeprefix('torch.')}: {', '.join(reasons)} ({others})"
            )
        return forced
    if not _worth_building(problem):
        for candidate in FUSED[problem.kind]:
            if candidate.own_operators and torch.compiler.is_exporting():
                continue
            if not candidate.reasons_against(problem):
                return candidate
    return reference.BACKEND


def explain(problem: Problem, requested: str | None = None) -> list[tuple[Backend, str]]:
    """Say of every backend whether it runs a problem, and why or why not.

    Args:
        problem: what is asked.
        requested: the layer's own `backend=`.

    Returns:
        (backend, sentence) for every backend; exactly one sentence starts
        with "runs:" unless a backend that cannot run is forced.
    """
    forced = _forced(requested)
    small = _worth_building(problem)
    chosen = forced or choose(problem, requested)
    sizes = f"map {problem.map_numbers:,} numbers, tensors {problem.tensor_numbers:,}"
    rows = []
    for entry in BACKENDS:
        reasons = entry.reasons_against(problem)
        if reasons:
            sentence = "cannot run: " + ", ".join(reasons)
        elif entry is chosen and forced is not None:
            sentence = "runs: asked for by name"
        elif entry is chosen and entry.builds_map and small:
            sentence = f"runs: the map is smaller than the tensors it relates ({sizes})"
        elif entry is chosen and entry.builds_map:
            sentence = "runs: no backend that fuses can"
        elif entry is chosen:
            sentence = f"runs: the first that can, and the map is not worth building ({sizes})"
        elif forced is not None:
            sentence = f"can run, but {forced.name} is asked for by name"
        elif small:
            sentence = f"can run, but the map is smaller than the tensors it relates ({sizes})"
        elif entry.builds_map:
            sentence = f"can run, but the map is not worth building ({sizes})"
        else:
            sentence = f"can run, but {chosen.name} comes first"
        rows.append((entry, sentence))
    return rows
