"""A run equals a plain loop of PyTorch, and its errors name the cause."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fullattn.segmentation.data import Augment, Examples, collate, open_dataset
from fullattn.segmentation.training.config import read
from fullattn.segmentation.training.sampling import StepSampler
from helpers import tiny_data
from helpers.tiny_training import SETTINGS, STEPS, Tiny, result, run

pytestmark = pytest.mark.slow

MODEL = {"norm": "group", "dropout": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a dataset with six training images, one of them without labels."""
    root = tiny_data.camvid(tmp_path_factory.mktemp("data"))
    void = sorted((root / "labels" / "train").iterdir())[2]
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(void)
    return root


def batches(root: Path, settings: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and masks of every step."""
    config = read("camvid_small", [*SETTINGS, *settings])
    data, training = config.data, config.training
    augment = Augment(
        data.crop, data.scale, data.flip, data.photometric, mean=data.mean, std=data.std
    )
    examples = Examples(open_dataset("camvid", root, "train"), augment, seed=training.seed)
    for keys in StepSampler(len(examples), training.batch_size, STEPS, seed=training.seed):
        batch = collate([examples[key] for key in keys])
        yield batch["image"].double(), batch["mask"]


def pixel_loss(outputs: list[Tensor], target: Tensor, auxiliary_weight: float) -> Tensor:
    """Compute the mean cross-entropy over labelled pixels, written as sums."""
    labelled = target != 255
    total = torch.zeros((), dtype=torch.float64)
    for logits, weight in zip(outputs, (1.0, auxiliary_weight), strict=True):
        each = -logits.log_softmax(1).gather(1, target.where(labelled, 0)[:, None])[:, 0]
        total = total + weight * each[labelled].sum()
    return total / max(1, int(labelled.sum()))


def test_a_run_equals_a_plain_loop_of_pytorch(root: Path, tmp_path: Path) -> None:
    # Batches of one image, so that one step has no labels.
    settings = (
        "training.precision=64-true",
        "training.batch_size=1",
        "training.learning_rate=0.1",
        "training.head_learning_rate=10",
        "training.weight_decay=0.01",
        "training.decay_norm_and_bias=false",
        "training.warmup_steps=3",
        "training.auxiliary_weight=0.3",
        "training.clip_gradient_norm=1.0",
        "training.average_decay=0.8",
    )
    torch.manual_seed(0)
    model = Tiny(**MODEL).double()
    velocity = {name: torch.zeros_like(each) for name, each in model.named_parameters()}
    average: dict[str, Tensor] = {}
    labelled, norms = [], []
    for step, (images, target) in enumerate(batches(root, settings)):
        labelled.append(int((target != 255).sum()))
        loss = pixel_loss(list(model(images)), target, 0.3)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.stack([each.square().sum() for each in gradients]).sum().sqrt()
        norms.append(float(norm))
        rate = 0.1 * (1 - step / STEPS) ** 0.9 * min(1, (step + 1) / 3)
        with torch.no_grad():
            for (name, each), gradient in zip(model.named_parameters(), gradients, strict=True):
                decay = 0.01 if each.dim() > 1 else 0.0
                clipped = gradient / max(1.0, float(norm))
                velocity[name] = 0.9 * velocity[name] + clipped + decay * each
                each -= rate * (1 if name.startswith("backbone.") else 10) * velocity[name]
                before = average.get(name, each)
                average[name] = 0.8 * before + 0.2 * each
    assert min(labelled) == 0 < max(labelled)
    assert min(norms) < 1 < max(norms)
    output = tmp_path / "run"
    assert run(output, root, *settings, model=MODEL) == 0
    weights = torch.load(output / "last.ckpt", weights_only=True)
    for name, expected in average.items():
        for found in (result(output)["weights"][name], weights["state_dict"][f"model.{name}"]):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        current = weights["current_model_state"][f"model.{name}"]
        torch.testing.assert_close(current, model.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_a_run_learns_and_its_scores_belong_to_its_weights(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    # Not a multiple of the steps between evaluations, but the last step is evaluated as well.
    settings = ("training.steps=62", "training.learning_rate=0.2")
    assert run(output, root, *settings, "data.photometric=false") == 0
    found = result(output)
    assert found["mean_iou"] > 0.2  # by chance 1/11
    model = Tiny()
    model.load_state_dict(found["weights"])
    model.eval()
    confusion = torch.zeros(11, 11, dtype=torch.int64)
    config = read("camvid_small")
    mean, std = (torch.tensor(each)[:, None, None] for each in (config.data.mean, config.data.std))
    for image, mask in open_dataset("camvid", root, "val"):
        predicted = model(((image / 255 - mean) / std)[None]).argmax(1)[0]
        for true, guess in zip(mask.flatten().tolist(), predicted.flatten().tolist(), strict=True):
            if true != 255:
                confusion[true, guess] += 1
    assert torch.equal(confusion, found["confusion"])
    logged = next((output / "logs").rglob("metrics.csv")).read_text().splitlines()
    assert {"train/loss", "train/learning_rate", "val/mean_iou"} <= set(logged[0].split(","))
    assert len(logged) > 62
    assert list((output / "logs").rglob("events.out.tfevents*"))
    best = torch.load(output / "best.ckpt", weights_only=True)
    assert best["global_step"] % 6 == 0 or best["global_step"] == 62
    assert torch.load(output / "last.ckpt", weights_only=True)["global_step"] == 62


def error(output: Path) -> str:
    """Return the first line of a run's error, without the type."""
    text = output.with_name(f"{output.name}.error").read_text()
    return text.partition(": ")[2].partition("\n")[0]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(
    root: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    settings = ("training.learning_rate=1e15", "training.checkpoint_every=1")
    assert run(output, root, *settings) == 1
    message = error(output)
    assert re.match(r"step \d+: the (loss|gradient) is not finite; .* 0016E5_\d+, ", message)
    weights = torch.load(output / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in weights.items():
        assert weight.isfinite().all(), name


@pytest.fixture
def damaged(root: Path, tmp_path: Path) -> Path:
    """Copy the dataset and truncate one training and one validation image."""
    copy = tmp_path / "damaged"
    shutil.copytree(root, copy)
    for split in ("train", "val"):
        path = sorted((copy / "images" / split).iterdir())[1]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return copy


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_an_error_that_names_it(
    workers: int, damaged: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert run(output, damaged, f"data.workers={workers}") == 1
    message = error(output)
    assert str(damaged / "images" / "train") in message
    assert "truncated or damaged" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_skipped_and_listed(
    workers: int, damaged: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert run(output, damaged, f"data.workers={workers}", skip_bad=True) == 0
    bad = [sorted((damaged / "images" / split).iterdir())[1] for split in ("train", "val")]
    found: dict[str, Any] = result(output)
    assert found["skipped"] == [str(path) for path in bad]
    assert (output / "skipped.txt").read_text().splitlines() == found["skipped"]
    readable = open_dataset("camvid", damaged, "val")
    labelled = [
        int((readable.read(i)[1] != 255).sum())
        for i, sample in enumerate(readable.samples)
        if sample.image != bad[1]
    ]
    assert int(found["confusion"].sum()) == sum(labelled)
