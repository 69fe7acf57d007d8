"""Scores: equal to torchmetrics and to a count by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from fullattn.integrations.torchvision import ensure_importable
from fullattn.segmentation.evaluation import Scores, confusion_matrix
from fullattn.segmentation.evaluation.scores import table
from helpers.terminal import each_width, fitting

NAMES = ("Sky", "Pole", "Road", "Tree", "Car", "Sign")


def _labels(seed: int, present: list[int], shape: tuple[int, ...] = (2, 7, 9)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(present), shape, generator=generator)
    return torch.tensor(present)[places]


def _scores(predicted: Tensor, target: Tensor) -> Scores:
    confusion = confusion_matrix(len(NAMES))
    confusion.update(predicted, target)
    return Scores(confusion.compute(), NAMES)


present = st.lists(st.integers(0, len(NAMES) - 1), min_size=1, max_size=6)


@given(seed=st.integers(0, 999), true=present, guessed=present, ignored=st.booleans())
def test_scores_equal_those_of_torchmetrics_and_a_count(
    seed: int, true: list[int], guessed: list[int], ignored: bool
) -> None:
    target = _labels(seed, [*true, 255] if ignored else true)
    target[0, 0, 0] = true[0]  # a labelled pixel at least
    predicted = _labels(seed + 1, guessed)
    scores = _scores(predicted, target)

    counted = target.numpy() != 255
    t, p = target.numpy()[counted], predicted.numpy()[counted]
    iou, accuracy = [], []
    for k in range(len(NAMES)):
        both, either = ((t == k) & (p == k)).sum(), ((t == k) | (p == k)).sum()
        iou.append(both / either if either else np.nan)
        accuracy.append(both / (t == k).sum() if (t == k).any() else np.nan)
    np.testing.assert_allclose(scores.iou, iou, rtol=1e-12)
    np.testing.assert_allclose(scores.accuracy, accuracy, rtol=1e-12)
    assert scores.mean_iou == pytest.approx(np.nanmean(iou), rel=1e-12)
    assert scores.mean_accuracy == pytest.approx(np.nanmean(accuracy), rel=1e-12)
    assert scores.pixel_accuracy == pytest.approx((t == p).mean(), rel=1e-12)
    assert scores.pixels.tolist() == [(t == k).sum() for k in range(len(NAMES))]

    ensure_importable()
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    options = {"num_classes": len(NAMES), "ignore_index": 255}
    theirs = MulticlassJaccardIndex(average="none", **options)(predicted, target)
    torch.testing.assert_close(scores.iou.nan_to_num(0).float(), theirs)
    mean = MulticlassJaccardIndex(average="macro", **options)(predicted, target)
    assert scores.mean_iou == pytest.approx(float(mean), rel=1e-6)
    micro = MulticlassAccuracy(average="micro", **options)(predicted, target)
    assert scores.pixel_accuracy == pytest.approx(float(micro), rel=1e-6)


def test_batches_add_up() -> None:
    predicted, target = _labels(0, [0, 1, 2]), _labels(1, [0, 2, 3, 255])
    confusion = confusion_matrix(len(NAMES))
    for p, t in zip(predicted, target, strict=True):
        confusion.update(p[None], t[None])
    assert torch.equal(confusion.compute(), _scores(predicted, target).confusion)


def test_counts_that_float32_cannot_hold_are_exact() -> None:
    most = 2**24 + 1
    confusion = torch.tensor([[most, 0], [0, 1]])
    assert Scores(confusion, ["a", "b"]).pixel_accuracy == 1.0
    assert Scores(torch.tensor([[most, 1], [0, 0]]), ["a", "b"]).iou[0] == most / (most + 1)


def test_iou_is_nan_for_an_absent_class_and_0_for_one_only_predicted() -> None:
    scores = _scores(torch.tensor([[0, 0, 1]]), torch.tensor([[0, 0, 0]]))
    assert scores.iou.tolist() == pytest.approx([2 / 3, 0, *[math.nan] * 4], nan_ok=True)
    assert scores.mean_iou == pytest.approx(1 / 3)
    assert scores.accuracy.tolist() == pytest.approx([2 / 3, *[math.nan] * 5], nan_ok=True)


def test_groups_are_means_of_their_present_classes() -> None:
    confusion = torch.zeros(6, 6, dtype=torch.long)
    confusion[0, :2] = torch.tensor([6, 2])
    confusion[1, 1] = 2
    confusion[2, 2] = 9
    groups = {"thin": ["Pole", "Sign"], "large": ["Sky", "Road"], "no": ["Car", "Sign"]}
    means = Scores(confusion, NAMES, groups).group_means
    assert means == pytest.approx(
        {"thin": 0.5, "large": (0.75 + 1) / 2, "no": math.nan}, nan_ok=True
    )


def test_json_has_every_number_and_null_for_nan() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    scores = Scores(confusion, ["a", "b", "c"], {"thin": ["b"], "none": ["c"]}, 7, ["x.png"])
    read = json.loads(json.dumps(scores.as_dict(), allow_nan=False))
    assert read == {
        "mean_iou": 0.775,
        "pixel_accuracy": 0.875,
        "mean_accuracy": 0.875,
        "groups": {"thin": 0.8, "none": None},
        "classes": {
            "a": {"iou": 0.75, "accuracy": 0.75, "pixels": 4},
            "b": {"iou": 0.8, "accuracy": 1.0, "pixels": 4},
            "c": {"iou": None, "accuracy": None, "pixels": 0},
        },
        "images": 7,
        "skipped": ["x.png"],
        "confusion": [[3, 1, 0], [0, 4, 0], [0, 0, 0]],
    }


def test_the_table_says_the_same() -> None:
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    scores = Scores(confusion, ["road", "pole", "car"], {"thin": ["pole"]})
    console = Console(width=80)
    with console.capture() as captured:
        console.print(table(scores))
    lines = [line.split() for line in captured.get().splitlines()]
    for line in (
        ["road", "75.00", "75.00", "50.00"],
        ["pole", "80.00", "100.00", "50.00"],
        ["car", "–", "–", "0.00"],
        ["mean", "of", "thin", "80.00"],
        ["mean", "77.50", "87.50"],
        ["all", "pixels", "87.50"],
    ):
        assert line in lines


def test_wrong_shapes_and_groups_raise() -> None:
    with pytest.raises(ValueError, match="a confusion matrix of 2 classes, got one of shape"):
        Scores(torch.zeros(3, 3), ["a", "b"])
    with pytest.raises(ValueError, match="expected classes of a, b in group 'thin', got 'c'"):
        Scores(torch.zeros(2, 2), ["a", "b"], {"thin": ["c"]})


def test_without_torchmetrics_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.classification", None)
    with pytest.raises(ImportError, match=r"pip install 'fullattn\[train\]'"):
        confusion_matrix(2)


@each_width
def test_the_table_fits_the_terminal(width: int) -> None:
    names = ["a class of nine words that is longer than most", "Pole"]
    scores = Scores(torch.tensor([[3, 1], [0, 4]]) * 10**9, names, {"thin": ["Pole"]})
    text = fitting(lambda console: console.print(table(scores)), width)
    assert "mean of thin" in text
    assert "100.00" in text
