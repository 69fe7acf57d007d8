"""Attention layers for 2-D feature maps, and the tools to compare what they cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import fullattn._versions  # noqa: F401 - first: it refuses versions that are too old
from fullattn import checkpoints, functional
from fullattn._version import __version__ as __version__
from fullattn.attention import BackendError, backend
from fullattn.layers import ChannelNonLocal, FullyAttentional, SpatialNonLocal
from fullattn.swap import insert, remove, replay, swap

if TYPE_CHECKING:
    from fullattn import models, plot

__all__ = [
    "BackendError",
    "ChannelNonLocal",
    "FullyAttentional",
    "SpatialNonLocal",
    "backend",
    "checkpoints",
    "functional",
    "insert",
    "models",
    "plot",
    "remove",
    "replay",
    "swap",
]


def __getattr__(name: str) -> Any:
    """Import the networks and pictures when they are asked for; the layers do without them."""
    if name in ("models", "plot"):
        return import_module(f"fullattn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
