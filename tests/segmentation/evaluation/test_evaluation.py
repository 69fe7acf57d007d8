"""Evaluation on a dataset, and `fullattn evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fullattn._cli.errors import UsageError
from fullattn.segmentation.data import DataError, SegmentationDataset, open_dataset
from fullattn.segmentation.evaluation import evaluate, segment
from fullattn.segmentation.evaluation.loop import evaluating, normalised
from fullattn.segmentation.models import FLANet
from fullattn.segmentation.models.files import Description, describe, load
from helpers import tiny_data
from helpers.command_line import run_command
from helpers.processes import run_program

MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)
COLOURS = list(tiny_data.CAMVID.values())
TIE = 0.09  # squared distances of colours are whole numbers, so eleven of these change no order


class NearestColour(nn.Conv2d):
    """A network without training that predicts the class with the nearest colour.

    Among colours equally near it is the first, by a margin that float32 resolves.
    """

    def __init__(self, colours: list[tuple[int, int, int]] = COLOURS) -> None:
        super().__init__(3, len(colours), 1)
        colour = torch.tensor(colours) / 255
        self.weight.data = (2 * colour * torch.tensor(STD))[..., None, None]
        margin = TIE / 255**2 * torch.arange(len(colours))
        self.bias.data = 2 * colour @ torch.tensor(MEAN) - (colour**2).sum(1) - margin


def _count(dataset: SegmentationDataset, indices: range | list[int]) -> np.ndarray[Any, Any]:
    """Compute the confusion matrix of NearestColour in NumPy, from the files."""
    confusion = np.zeros((11, 11), np.int64)
    for index in indices:
        sample = dataset.samples[index]
        image = np.asarray(Image.open(sample.image)).astype(float)
        mask = np.asarray(Image.open(sample.mask))
        distance = ((image[:, :, None] - np.array(COLOURS)) ** 2).sum(-1)
        guessed = (distance + TIE * np.arange(11)).argmin(-1)
        np.add.at(confusion, (mask[mask != 255], guessed[mask != 255]), 1)
    return confusion


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images, of which the fourth is larger."""
    root = tiny_data.camvid(tmp_path_factory.mktemp("camvid"), images=5, size=(24, 32))
    random = np.random.default_rng(9)
    image, mask = tiny_data.picture((30, 28), [0, 3, 255], random, dict(enumerate(COLOURS)))
    name = open_dataset("camvid", root, "test").samples[3].name
    tiny_data.save(root / "images/test" / f"{name}.jpg", image)
    tiny_data.save(root / "labels/test" / f"{name}.png", mask)
    return root


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Five images; the second image and the fourth mask cannot be read."""
    root = tiny_data.camvid(tmp_path / "damaged", images=5, size=(24, 32))
    samples = open_dataset("camvid", root, "test").samples
    samples[1].image.write_bytes(samples[1].image.read_bytes()[:300])
    samples[3].mask.write_bytes(b"")
    return root


def _evaluate(model: nn.Module, root: Path, **options: Any) -> Any:
    return evaluate(model, open_dataset("camvid", root, "test"), mean=MEAN, std=STD, **options)


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 0), (9, 0), (2, 2)])
def test_the_confusion_matrix_is_that_of_the_files(
    root: Path, batch_size: int, workers: int
) -> None:
    dataset = open_dataset("camvid", root, "test")
    scores = _evaluate(NearestColour(), root, batch_size=batch_size, workers=workers)
    assert scores.confusion.tolist() == _count(dataset, range(5)).tolist()
    assert scores.images == 5
    assert scores.mean_iou > 0.8
    assert scores.classes == dataset.classes
    assert list(scores.group_means) == ["thin", "large"]


def test_only_the_chosen_samples_are_counted(root: Path) -> None:
    scores = _evaluate(NearestColour(), root, indices=[3, 1])
    assert (
        scores.confusion.tolist() == _count(open_dataset("camvid", root, "test"), [1, 3]).tolist()
    )


def test_progress_counts_the_images_and_batches_are_of_one_size(root: Path) -> None:
    done: list[int] = []
    _evaluate(NearestColour(), root, batch_size=2, progress=done.append)
    assert done == [2, 1, 1, 1]  # the fourth has a size of its own


def test_passes_are_those_of_segment(root: Path) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 11, 7, padding=3)
    options: dict[str, Any] = {
        "scales": (0.5, 1.5),
        "flip": True,
        "window": (20, 16),
        "stride": (10, 16),
    }
    dataset = open_dataset("camvid", root, "test")
    expected = torch.zeros(11, 11, dtype=torch.long)
    for index in range(5):
        image, mask = dataset.read(index)
        found = segment(model, normalised(image[None], MEAN, STD), **options)[0].argmax(0)
        known = mask != 255
        expected += torch.bincount(11 * mask[known].long() + found[known], minlength=121).view(
            11, 11
        )
    assert _evaluate(model, root, batch_size=2, **options).confusion.tolist() == expected.tolist()


def test_each_colour_is_normalised() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    expected = (images.numpy() / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    torch.testing.assert_close(normalised(images, MEAN, STD), torch.from_numpy(expected).float())


class MixedModes(nn.Module):
    """Records the modes in which its modules run; one module starts in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = NearestColour()
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self.seen += [module.training for module in self.modules()]
        logits: Tensor = self.colour(self.frozen(self.norm(x)))
        return [logits] if self.training else logits


def test_the_model_runs_in_evaluation_mode_and_its_modes_are_restored(root: Path) -> None:
    model = MixedModes()
    before = [module.training for module in model.modules()]
    statistics = model.norm.running_mean.clone()
    _evaluate(model, root)
    assert model.seen
    assert not any(model.seen)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model.norm.running_mean, statistics)


def test_the_modes_are_restored_after_an_error() -> None:
    model = MixedModes()
    with pytest.raises(RuntimeError, match="oh"), evaluating(model):
        raise RuntimeError("oh")
    assert model.training
    assert not model.frozen.training


def test_a_lower_precision_is_that_of_the_model_alone(root: Path) -> None:
    seen = []

    class Noting(NearestColour):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            seen.append((x.dtype, logits.dtype))
            return logits

    exact = _evaluate(Noting(), root)
    rough = _evaluate(Noting(), root, precision="bfloat16")
    assert set(seen) == {(torch.float32, torch.float32), (torch.float32, torch.bfloat16)}
    assert rough.mean_iou == pytest.approx(exact.mean_iou, abs=0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_an_error_that_names_the_first(damaged: Path, workers: int) -> None:
    bad = open_dataset("camvid", damaged, "test").samples[1].image
    with pytest.raises(DataError) as raised:
        _evaluate(NearestColour(), damaged, workers=workers)
    assert str(raised.value).startswith(f"{bad} ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_listed_and_the_rest_is_counted(damaged: Path, workers: int) -> None:
    dataset = open_dataset("camvid", damaged, "test")
    scores = _evaluate(NearestColour(), damaged, workers=workers, skip_bad=True, batch_size=2)
    assert scores.skipped == [str(dataset.samples[1].image), str(dataset.samples[3].mask)]
    assert scores.images == 3
    assert scores.confusion.tolist() == _count(dataset, [0, 2, 4]).tolist()


def test_files_that_the_data_set_dropped_are_listed_too(tmp_path: Path) -> None:
    root = tiny_data.camvid(tmp_path, images=2, size=(24, 32))
    lonely = open_dataset("camvid", root, "test").samples[0]
    lonely.mask.unlink()
    dataset = open_dataset("camvid", root, "test", skip_bad=True)
    scores = evaluate(NearestColour(), dataset, mean=MEAN, std=STD, skip_bad=True)
    assert scores.images == 1
    assert scores.skipped == [str(lonely.image)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scales": (0.0,)}, "scales above 0"),
        ({"precision": "float8"}, "a precision of float32, bfloat16, float16, got 'float8'"),
        ({"batch_size": 0}, "a batch size of at least 1, got 0"),
        ({"indices": []}, "expected at least one image of camvid, got none"),
    ],
)
def test_invalid_options_raise(root: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _evaluate(NearestColour(), root, **options)


def test_evaluation_without_scores_raises(damaged: Path) -> None:
    dataset = open_dataset("camvid", damaged, "test")
    with pytest.raises(ValueError, match="the 11 classes of camvid, got 7"):
        _evaluate(nn.Conv2d(3, 7, 1), damaged, indices=[0])
    with pytest.raises(ValueError, match="none of 2 images of camvid can be read"):
        _evaluate(NearestColour(), damaged, indices=[1, 3], skip_bad=True)
    tiny_data.save(dataset.samples[0].mask, np.full((24, 32), 255, np.uint8))
    with pytest.raises(ValueError, match="no pixel of 1 images of camvid is labelled"):
        _evaluate(NearestColour(), damaged, indices=[0])
    dataset.samples = tuple(sample._replace(mask=None) for sample in dataset.samples)
    with pytest.raises(ValueError, match=f"{dataset.samples[0].image} has no mask"):
        evaluate(NearestColour(), dataset, mean=MEAN, std=STD)


# fullattn evaluate


_run = partial(run_command, "evaluate")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("checkpoint") / "last.ckpt", 11)


def _save(path: Path, classes: int, names: list[str] | None = None, **arguments: Any) -> Path:
    """A small FLANet with random weights in a file of `fullattn train`."""
    torch.manual_seed(0)
    model = FLANet(classes, "test_resnet", channels=8, out_channels=8, auxiliary=False, **arguments)
    description = Description(
        model=describe(model),
        dataset="camvid",
        classes=names or list(tiny_data.CAMVID)[:classes],
        palette=COLOURS[:classes],
        groups={},
        mean=MEAN,
        std=STD,
        step=7,
    )
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "fullattn": description.plain()}, path)
    return path


def test_the_command_prints_a_table_and_writes_json(
    checkpoint: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "scores.json"
    _run(checkpoint, "--data", "camvid", root, "--only", "Seq05VD*", "--output", file)
    printed = capsys.readouterr().out
    assert "last.ckpt on camvid, test, Seq05VD*: 3 images" in printed
    report = json.loads(file.read_text())
    direct = _evaluate(load(checkpoint).model, root, indices=[2, 3, 4])
    assert report["scores"] == json.loads(json.dumps(direct.as_dict()))
    assert f"{100 * direct.pixel_accuracy:.2f}" in printed
    assert report["step"] == 7
    assert report["network"]["attention"] == "fully"
    assert report["data"] == {"name": "camvid", "split": "test", "only": "Seq05VD*"}
    assert report["environment"]["torch"] == torch.__version__
    assert [path.name for path in file.parent.iterdir()] == ["scores.json"]


def test_the_options_of_the_command_reach_the_evaluation(
    checkpoint: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def noting(model: nn.Module, dataset: SegmentationDataset, **options: Any) -> None:
        found.update(options, split=dataset.split)
        raise ValueError("enough")

    monkeypatch.setattr("fullattn.segmentation.evaluation.loop.evaluate", noting)
    with pytest.raises(UsageError, match="enough"):
        _run(
            *(checkpoint, "--data", "camvid", root, "--split", "train+val", "--skip-bad"),
            *("--scales", "0.5", "1.75", "--flip", "--window", "24x16", "--stride", "8x9"),
            *("--batch-size", "3", "--workers", "2", "--precision", "bfloat16"),
        )
    del found["progress"]
    assert found == {
        "mean": list(MEAN),
        "std": list(STD),
        "batch_size": 3,
        "workers": 2,
        "device": torch.device("cpu"),
        "precision": "bfloat16",
        "skip_bad": True,
        "scales": (0.5, 1.75),
        "flip": True,
        "window": (24, 16),
        "stride": (8, 9),
        "split": "train+val",
    }


def test_the_command_lists_what_it_skipped(
    checkpoint: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = open_dataset("camvid", damaged, "test").samples
    _run(checkpoint, "--data", "camvid", damaged, "--skip-bad")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    start = lines.index("2 files were skipped:")
    assert lines[start + 1 : start + 3] == [str(samples[1].image), str(samples[3].mask)]


def test_other_class_names_print_a_warning(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _save(tmp_path / "a.ckpt", 11, names=[f"class{i}" for i in range(11)])
    _run(file, "--data", "camvid", root)
    assert "the checkpoint's classes have other names: class0, class1" in capsys.readouterr().out


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:5000])
    return path


BAD: dict[str, tuple[Callable[[Path, Path, Path], list[Any]], str]] = {
    "no checkpoint": (
        lambda c, root, tmp: [tmp / "no.ckpt", "--data", "camvid", root],
        "expected a checkpoint that can be read at '.*no.ckpt'",
    ),
    "half a checkpoint": (
        lambda c, root, tmp: [_cut(_save(tmp / "half.ckpt", 11)), "--data", "camvid", root],
        "half.ckpt is truncated or damaged",
    ),
    "another number of classes": (
        lambda c, root, tmp: [_save(tmp / "five.ckpt", 5), "--data", "camvid", root],
        "five.ckpt was trained on 5 classes of camvid, but camvid has 11",
    ),
    "no data set of the name": (
        lambda c, root, tmp: [c, "--data", "camwid", root],
        "unknown dataset 'camwid'",
    ),
    "no data": (lambda c, root, tmp: [c, "--data", "camvid", tmp / "none"], "none"),
    "no file that matches": (
        lambda c, root, tmp: [c, "--data", "camvid", root, "--only", "Seq9*"],
        "no image of camvid test matches 'Seq9\\*': the names are 0001TP_008550.jpg",
    ),
    "scale 0": (
        lambda c, root, tmp: [c, "--data", "camvid", root, "--scales", "0"],
        "scales above 0, got 0.0",
    ),
    "gaps": (
        lambda c, root, tmp: [c, "--data", "camvid", root, "--window", "8x8", "--stride", "9x8"],
        "would leave pixels out",
    ),
    "no device": (
        lambda c, root, tmp: [c, "--data", "camvid", root, "--device", "quantum"],
        "a device such as cpu",
    ),
    "a folder as output": (
        lambda c, root, tmp: [c, "--data", "camvid", root, "--output", tmp],
        "expected a file for --output",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_one_line_error_and_nothing_is_written(
    case: str, checkpoint: Path, root: Path, tmp_path: Path
) -> None:
    arguments, said = BAD[case]
    given = arguments(checkpoint, root, tmp_path)
    before = sorted(tmp_path.iterdir())
    if "--output" not in given:
        given += ["--output", tmp_path / "out" / "scores.json"]
    with pytest.raises(UsageError, match=said) as raised:
        _run(*given)
    assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == before


def test_an_unreadable_file_is_a_one_line_error_and_nothing_is_written(
    checkpoint: Path, damaged: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"0001TP_008580\.jpg cannot be read"):
        _run(checkpoint, "--data", "camvid", damaged, "--output", tmp_path / "out" / "scores.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scales", "nan"], "expected a number, got 'nan'"),
        (["--scales", "big"], "expected a number, got 'big'"),
        (["--window", "8"], "expected HxW such as 512x1024, got '8'"),
        (["--workers", "-1"], "expected a whole number from 0, got '-1'"),
        (["--batch-size", "0"], "expected a whole number of at least 1, got '0'"),
        (["--precision", "float8"], "float8"),
    ],
)
def test_bad_arguments_are_a_one_line_error(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        _run("last.ckpt", "--data", "camvid", "data", *arguments)
    assert raised.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


def test_the_commands_are_light_to_import_and_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys; import fullattn.segmentation.evaluation.command;"
        "heavy = {'torchmetrics', 'matplotlib', 'timm', 'torchvision', 'lightning', 'PIL', 'rich'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "import fullattn.plot;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    run_program(code).check_returncode()
