"""Segmentation networks around the attention layers."""

from fullattn.models.attention import Dual, attentions
from fullattn.models.flanet import FLANet
from fullattn.models.head import SegmentationHead

__all__ = ["Dual", "FLANet", "SegmentationHead", "attentions"]
