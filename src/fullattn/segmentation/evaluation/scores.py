"""What a confusion matrix says: intersection over union, accuracies, means over groups of classes.

The matrix is torchmetrics', which sums over batches and over processes. Everything else is
computed from it in float64, so that a class with few pixels among billions is counted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassConfusionMatrix

__all__ = ["Scores", "confusion_matrix"]


def confusion_matrix(num_classes: int, ignore_index: int = 255) -> MulticlassConfusionMatrix:
    """A counter of pixels by true and predicted class, from torchmetrics.

    Args:
        num_classes: K.
        ignore_index: label of pixels that are not counted.

    Returns:
        The metric: `update(predicted, target)` with labels (B, H, W), and `compute()` gives (K, K)
        with true classes in rows and predicted ones in columns.

    Raises:
        ImportError: torchmetrics is missing.

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
        raise ImportError(
            "scores need torchmetrics, which is missing: pip install 'fullattn[train]'"
        ) from error
    # Labels are checked where they are read, once; here it would sort every mask at every call.
    return MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)


@dataclass(frozen=True)
class Scores:
    """The scores of a network over a data set.

    A class that is nowhere, neither in the labels nor in the predictions, has no IoU: it is nan,
    and no mean counts it. A class that is predicted but nowhere in the labels has IoU 0.

    Args:
        confusion: pixels by true class (rows) and predicted class (columns), (K, K).
        classes: K names.
        groups: names of groups and of the classes in them.
        images: how many images were counted.
        skipped: files that could not be read.

    Raises:
        ValueError: the numbers of classes differ, or a group names a class that is not there.

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
            for member in members:
                if member not in self.classes:
                    raise ValueError(
                        f"expected classes of {', '.join(self.classes)} in group {group!r}, "
                        f"got {member!r}"
                    )

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class, (K); nan for a class that is nowhere."""
        counts = self.confusion.double()
        right = counts.diagonal()
        return right / (counts.sum(0) + counts.sum(1) - right)

    @property
    def mean_iou(self) -> float:
        """Mean of the classes' IoU."""
        return float(self.iou.nanmean())

    @property
    def accuracy(self) -> Tensor:
        """Share of each class's pixels that got that class, (K); nan for one without pixels."""
        counts = self.confusion.double()
        return counts.diagonal() / counts.sum(1)

    @property
    def mean_accuracy(self) -> float:
        """Mean of the classes' accuracies."""
        return float(self.accuracy.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Share of all labelled pixels that got their class."""
        counts = self.confusion.double()
        return float(counts.diagonal().sum() / counts.sum())

    @property
    def pixels(self) -> Tensor:
        """Labelled pixels of each class, (K)."""
        return self.confusion.sum(1)

    @property
    def group_means(self) -> dict[str, float]:
        """Mean IoU of each group's classes."""
        places = {name: place for place, name in enumerate(self.classes)}
        return {
            group: float(self.iou[[places[member] for member in members]].nanmean())
            for group, members in self.groups.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON, which has no nan: None stands in its place."""
        rows = zip(
            self.classes,
            self.iou.tolist(),
            self.accuracy.tolist(),
            self.pixels.tolist(),
            strict=True,
        )
        return {
            "mean_iou": _or_none(self.mean_iou),
            "pixel_accuracy": _or_none(self.pixel_accuracy),
            "mean_accuracy": _or_none(self.mean_accuracy),
            "groups": {group: _or_none(mean) for group, mean in self.group_means.items()},
            "classes": {
                name: {"iou": _or_none(iou), "accuracy": _or_none(accuracy), "pixels": pixels}
                for name, iou, accuracy, pixels in rows
            },
            "images": self.images,
            "skipped": list(self.skipped),
            "confusion": self.confusion.tolist(),
        }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
