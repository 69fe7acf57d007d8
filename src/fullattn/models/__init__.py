"""Segmentation networks around the attention layers."""

from fullattn.models.attention import ATTENTIONS, Dual
from fullattn.models.flanet import FLANet
from fullattn.models.head import SegmentationHead

__all__ = ["ATTENTIONS", "Dual", "FLANet", "SegmentationHead"]
