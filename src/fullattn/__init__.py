"""Attention layers for 2-D feature maps, and the tools to compare what they cost."""

from fullattn import checkpoints, functional, models
from fullattn.attention import BackendError, backend
from fullattn.layers import ChannelNonLocal, FullyAttentional, SpatialNonLocal
from fullattn.surgery import insert, remove, swap

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
    "remove",
    "swap",
]
__version__ = "0.1.0"
