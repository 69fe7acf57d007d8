"""Evaluation of trained networks: the public names of `fullattn.segmentation.evaluation`."""

from fullattn.segmentation.evaluation import *  # noqa: F403
from fullattn.segmentation.evaluation import __all__ as __all__
