"""Segmentation networks with the attention layers."""

from fullattn.segmentation.models import files
from fullattn.segmentation.models.attention_choices import Dual, attentions
from fullattn.segmentation.models.flanet import FLANet
from fullattn.segmentation.models.head import SegmentationHead

__all__ = ["Dual", "FLANet", "SegmentationHead", "attentions", "files"]
