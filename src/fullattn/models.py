"""Segmentation networks: the public names of `fullattn.segmentation.models`."""

from fullattn.segmentation.models import *  # noqa: F403
from fullattn.segmentation.models import __all__ as __all__
