"""Attention layers for 2-D feature maps, and the tools to compare what they cost."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import fullattn._versions  # noqa: F401 - first: it refuses versions that are too old
from fullattn import attention, checkpoints, costs, functional, integrations, layers, reshape
from fullattn._version import __version__ as __version__
from fullattn.attention import BackendError, backend
from fullattn.layers import ChannelNonLocal, FullyAttentional, SpatialNonLocal
from fullattn.swap import insert, remove, replay, swap

if TYPE_CHECKING:
    from fullattn import data, evaluation, models, plot, segmentation

__all__ = [
    "BackendError",
    "ChannelNonLocal",
    "FullyAttentional",
    "SpatialNonLocal",
    "attention",
    "backend",
    "checkpoints",
    "costs",
    "data",
    "evaluation",
    "functional",
    "insert",
    "integrations",
    "layers",
    "models",
    "plot",
    "remove",
    "replay",
    "reshape",
    "segmentation",
    "swap",
]

# Modules that are imported when they are asked for, and the packages that their import needs.
_LAZY: dict[str, tuple[str, ...]] = {
    "data": ("numpy", "PIL"),
    "evaluation": (),
    "models": (),
    "plot": ("matplotlib",),
    "segmentation": (),
}


def __getattr__(name: str) -> Any:
    """Import a module when it is asked for; the layers do without it."""
    if name in _LAZY:
        return import_module(f"fullattn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, without the modules whose packages are not installed.

    `help` gets every listed name, and an import that fails would end it.
    """
    missing = {name for name, needs in _LAZY.items() if not all(map(find_spec, needs))}
    return sorted({*__all__, "__version__"} - missing)
