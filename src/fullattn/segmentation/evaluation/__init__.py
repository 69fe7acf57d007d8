"""Evaluation and prediction: what a trained network sees, and how often it is right.

`segment` gives the probability of every class at every pixel, from one pass or many; `evaluate`
compares them with the masks of a data set and returns `Scores`. `overlay` draws the classes, `maps`
the similarity maps of a photograph.
"""

from fullattn.segmentation.evaluation.loop import evaluate, normalised
from fullattn.segmentation.evaluation.passes import segment
from fullattn.segmentation.evaluation.scores import Scores, confusion_matrix

__all__ = ["Scores", "confusion_matrix", "evaluate", "normalised", "segment"]
