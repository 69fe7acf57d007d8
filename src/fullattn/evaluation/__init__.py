"""Evaluation and prediction: what a trained network sees, and how often it is right.

`segment` gives the probability of every class at every pixel, from one pass or many; `evaluate`
compares them with the masks of a data set and returns `Scores`. Pictures of classes are in
`fullattn.evaluation.overlay`, those of similarity maps in `fullattn.plot` and, for a photograph,
`fullattn.evaluation.maps`; they need Pillow and matplotlib.
"""

from fullattn.evaluation.loop import evaluate
from fullattn.evaluation.passes import segment
from fullattn.evaluation.scores import Scores, confusion_matrix

__all__ = ["Scores", "confusion_matrix", "evaluate", "segment"]
