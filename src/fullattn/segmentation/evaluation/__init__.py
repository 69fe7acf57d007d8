"""Evaluation and prediction with trained segmentation networks.

`segment` computes class probabilities, with optional test-time augmentation; `evaluate` compares
them with the masks of a dataset and returns `Scores`. `overlay` draws the classes, `maps` the
similarity maps of a photograph.
"""

from fullattn.segmentation.evaluation.loop import evaluate, normalised
from fullattn.segmentation.evaluation.passes import segment
from fullattn.segmentation.evaluation.scores import Scores, confusion_matrix

__all__ = ["Scores", "confusion_matrix", "evaluate", "normalised", "segment"]
