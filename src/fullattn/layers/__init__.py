"""The layers that go into a network."""

from fullattn.layers.channel_non_local import ChannelNonLocal
from fullattn.layers.fully_attentional import FullyAttentional
from fullattn.layers.spatial_non_local import SpatialNonLocal

__all__ = ["ChannelNonLocal", "FullyAttentional", "SpatialNonLocal"]
