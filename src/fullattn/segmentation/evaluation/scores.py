"""Scores from a confusion matrix: intersection over union, accuracies, means of groups.

The matrix is torchmetrics', which sums over batches and processes. The scores are computed from it
in float64, so that a class with few pixels among billions is counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fullattn._text import installing

if TYPE_CHECKING:
    from rich.table import Table
    from torchmetrics.classification import MulticlassConfusionMatrix

__all__ = ["Scores", "confusion_matrix", "table"]


def confusion_matrix(num_classes: int, ignore_index: int = 255) -> MulticlassConfusionMatrix:
    """Create torchmetrics' confusion matrix of pixels.

    Args:
        num_classes: number of classes, K.
        ignore_index: label of pixels that are not counted.

    Returns:
        The metric: `update(predicted, target)` takes labels (B, H, W); `compute()` returns (K, K)
        with true classes in rows and predicted ones in columns.

    Raises:
        ImportError: torchmetrics is not installed.

    Example:
        >>> import torch
        >>> matrix = confusion_matrix(2)
        >>> matrix.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]))
        >>> matrix.compute()
        tensor([[1, 1],
                [0, 0]])
    """
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ImportError as error:
        raise ImportError(f"scores need torchmetrics: {installing('train')}") from error
    # The dataset has checked the labels; validate_args would sort every mask at every call.
    return MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)


@dataclass(frozen=True)
class Scores:
    """Scores of a network on a dataset.

    A class that is neither in the labels nor in the predictions has IoU nan, which the means leave
    out. A class that is predicted but not in the labels has IoU 0.

    Args:
        confusion: pixels by true class (rows) and predicted class (columns), (K, K).
        classes: K names.
        groups: names of classes by the name of their group.
        images: number of images.
        skipped: files that could not be read.

    Raises:
        ValueError: the numbers of classes differ, or a group has an unknown class.

    Example:
        >>> import torch
        >>> scores = Scores(
        ...     torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]),
        ...     ["Road", "Pole", "Tree"],
        ...     {"thin": ["Pole"]},
        ... )
        >>> scores.iou
        tensor([0.7500, 0.8000,    nan], dtype=torch.float64)
        >>> scores.mean_iou, scores.pixel_accuracy, scores.group_means
        (0.775, 0.875, {'thin': 0.8})
    """

    confusion: Tensor
    classes: Sequence[str]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    images: int = 0
    skipped: Sequence[str] = ()

    def __post_init__(self) -> None:
        number = len(self.classes)
        if self.confusion.shape != (number, number):
            raise ValueError(
                f"expected a confusion matrix of {number} classes, got one of shape "
                f"{tuple(self.confusion.shape)}"
            )
        for group, members in self.groups.items():
            for member in (each for each in members if each not in self.classes):
                raise ValueError(
                    f"expected classes of {', '.join(self.classes)} in group {group!r}, "
                    f"got {member!r}"
                )

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, (K); nan if neither labelled nor predicted."""
        counts = self.confusion.double()
        correct = counts.diagonal()
        return correct / (counts.sum(0) + counts.sum(1) - correct)

    @property
    def mean_iou(self) -> float:
        """Mean of the classes' IoU."""
        return float(self.iou.nanmean())

    @property
    def accuracy(self) -> Tensor:
        """Fraction of each class's pixels that are correct, (K); nan for a class without pixels."""
        counts = self.confusion.double()
        return counts.diagonal() / counts.sum(1)

    @property
    def mean_accuracy(self) -> float:
        """Mean of the classes' accuracies."""
        return float(self.accuracy.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Fraction of all labelled pixels that are correct."""
        counts = self.confusion.double()
        return float(counts.diagonal().sum() / counts.sum())

    @property
    def pixels(self) -> Tensor:
        """Labelled pixels of each class, (K)."""
        return self.confusion.sum(1)

    @property
    def group_means(self) -> dict[str, float]:
        """Mean IoU of each group's classes."""
        iou, indices = self.iou, {name: index for index, name in enumerate(self.classes)}
        return {
            group: float(iou[[indices[member] for member in members]].nanmean())
            for group, members in self.groups.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Convert the scores to plain values for JSON, with None for nan."""
        columns = (self.iou.tolist(), self.accuracy.tolist(), self.pixels.tolist())
        return {
            "mean_iou": _or_none(self.mean_iou),
            "pixel_accuracy": _or_none(self.pixel_accuracy),
            "mean_accuracy": _or_none(self.mean_accuracy),
            "groups": {group: _or_none(mean) for group, mean in self.group_means.items()},
            "classes": {
                name: {"iou": _or_none(iou), "accuracy": _or_none(accuracy), "pixels": pixels}
                for name, iou, accuracy, pixels in zip(self.classes, *columns, strict=True)
            },
            "images": self.images,
            "skipped": list(self.skipped),
            "confusion": self.confusion.tolist(),
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(scores: Scores) -> Table:
    """Format IoU, accuracy and share of the pixels of each class, and the means, in per cent."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("class")
    for heading in ("IoU %", "accuracy %", "of pixels %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shares = scores.pixels / scores.pixels.sum()
    columns = (scores.classes, scores.iou.tolist(), scores.accuracy.tolist(), shares.tolist())
    for name, *values in zip(*columns, strict=True):
        shown.add_row(name, *map(_percent, values))
    shown.add_section()
    for group, mean in scores.group_means.items():
        shown.add_row(f"mean of {group}", _percent(mean))
    shown.add_section()
    shown.add_row("mean", _percent(scores.mean_iou), _percent(scores.mean_accuracy))
    shown.add_row("all pixels", "", _percent(scores.pixel_accuracy))
    return shown


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f}"
