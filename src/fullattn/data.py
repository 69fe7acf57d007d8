"""Data sets of images and masks: the public names of `fullattn.segmentation.data`."""

from fullattn.segmentation.data import *  # noqa: F403
from fullattn.segmentation.data import __all__ as __all__
