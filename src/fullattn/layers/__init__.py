"""The attention layers, and their registry."""

from fullattn.layers.channel_non_local import ChannelNonLocal
from fullattn.layers.fully_attentional import FullyAttentional
from fullattn.layers.protocol import (
    LAYERS,
    AttentionLayer,
    Convolutions,
    Work,
    register,
    unregister,
)
from fullattn.layers.spatial_non_local import SpatialNonLocal

for _layer in (FullyAttentional, ChannelNonLocal, SpatialNonLocal):
    register(_layer)

__all__ = [
    "LAYERS",
    "AttentionLayer",
    "ChannelNonLocal",
    "Convolutions",
    "FullyAttentional",
    "SpatialNonLocal",
    "Work",
    "register",
    "unregister",
]
