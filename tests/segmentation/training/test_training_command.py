"""`fullattn train`, from arguments to files and error messages."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.status import Status

from fullattn.segmentation.training import fit
from fullattn.segmentation.training.config import read
from helpers import tiny_data
from helpers.tiny_training import processes

pytestmark = pytest.mark.slow

# A FLANet that trains in seconds.
SETTINGS = (
    "training.steps=2",
    "training.batch_size=2",
    "data.crop=[32,48]",
    "data.workers=0",
    "model.channels=8",
    "model.out_channels=8",
    "model.auxiliary_channels=8",
)


def _command(printed: Path, arguments: list[str]) -> None:
    """Run the command in this process, with its output in a file."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with (
        printed.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        from fullattn._cli.main import main

        sys.exit(main(["train", *arguments]))


def command(folder: Path, *arguments: object) -> tuple[int, str]:
    """Run `fullattn train` in a new process, and return its exit status and output."""
    printed = folder / "printed"
    process = processes().Process(target=_command, args=(printed, [*map(str, arguments)]))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, printed.read_text()


def train(folder: Path, root: Path, *arguments: object) -> tuple[int, str]:
    """Run `fullattn train` with a small network and the output `folder`/out."""
    settings = [each for each in map(str, arguments) if "=" in each]
    flags = [each for each in map(str, arguments) if "=" not in each]
    common = ("camvid_small", "--data", root, "--output", folder / "out", *flags)
    return command(folder, *common, "--set", *SETTINGS, *settings)


def error_of(folder: Path, root: Path, *arguments: object) -> str:
    """Return the one-line error of a run that does not start."""
    status, printed = train(folder, root, *arguments)
    assert status == 2, printed
    message = printed.splitlines()[-1]
    assert message.startswith("fullattn: ")
    assert "Traceback" not in printed
    assert "step 1/" not in printed
    return message


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.camvid(tmp_path_factory.mktemp("data"), images=4)


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    status, printed = train(folder, root)
    assert status == 0, printed
    return folder / "out"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """Copy a finished run to out/ in a new folder."""
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path


def test_a_trained_network_can_be_loaded_and_used(trained: Path) -> None:
    from fullattn.segmentation.models.files import load

    for name in ("last.ckpt", "best.ckpt"):
        found = load(trained / name)
        assert found.description.dataset == "camvid"
        assert tuple(found.description.classes) == tuple(tiny_data.CAMVID)
        assert found.description.step == 2
        assert list(found.description.mean) == [0.5, 0.5, 0.5]
        with torch.no_grad():
            assert found.model(torch.randn(1, 3, 32, 48)).shape == (1, 11, 32, 48)
    assert read(trained / "config.yaml").model.channels == 8


def test_a_finished_run_is_unchanged_and_must_be_resumed(copied: Path, root: Path) -> None:
    before = (copied / "out" / "last.ckpt").read_bytes()
    assert "holds files: continue its run with --resume" in error_of(copied, root)
    status, printed = train(copied, root, "--resume")
    assert status == 0, printed
    last = copied / "out" / "last.ckpt"
    assert printed.splitlines()[-2:] == [
        f"step 2: {last}",
        f"next: fullattn evaluate {last} --data camvid {root} --split val",
    ]
    assert (copied / "out" / "last.ckpt").read_bytes() == before


def test_resuming_without_a_checkpoint_starts_at_the_first_step(root: Path, tmp_path: Path) -> None:
    status, printed = train(tmp_path, root, "--resume", "training.steps=1", "data.val=null")
    assert status == 0, printed
    assert "starts at the first step" in printed
    assert (tmp_path / "out" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--attention", "channel"], "model.attention fully, and this run has channel"),
        (["model.channels=16"], "model.channels 8, and this run has 16"),
        (["training.learning_rate=0.5"], "training.learning_rate 0.02, and this run has 0.5"),
        (["--seed", "3"], "training.seed 0, and this run has 3"),
    ],
)
def test_another_run_cannot_be_resumed(
    arguments: list[str], reason: str, copied: Path, root: Path
) -> None:
    config = (copied / "out" / "config.yaml").read_bytes()
    message = error_of(copied, root, *arguments, "--resume")
    assert reason in message
    assert str(copied / "out" / "last.ckpt") in message
    assert (copied / "out" / "config.yaml").read_bytes() == config


def folder_data(root: Path, size: tuple[int, int] = (48, 64)) -> Path:
    """Create images and masks of three classes."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(3):
            image, mask = tiny_data.picture(size, [0, 1, 2], random)
            tiny_data.save(root / "images" / split / f"{i}.png", image)
            tiny_data.save(root / "masks" / split / f"{i}.png", mask)
    return root


def test_other_data_cannot_be_resumed(copied: Path, tmp_path: Path) -> None:
    other = folder_data(tmp_path / "other")
    message = error_of(copied, other, "data.name=folder", "--resume")
    assert "data.name camvid, and this run has folder" in message


def test_other_classes_of_a_folder_cannot_be_resumed(tmp_path: Path) -> None:
    root = folder_data(tmp_path / "data")
    settings = ("data.name=folder", "training.steps=1", "data.val=null")
    status, printed = train(tmp_path, root, *settings)
    assert status == 0, printed
    (root / "classes.txt").write_text("zero\nother\ntwo\n")
    message = error_of(tmp_path, root, *settings, "--resume")
    assert "it was saved with class " in message
    assert "and this run has zero" in message


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_damaged_checkpoint_cannot_be_resumed(size: int, copied: Path, root: Path) -> None:
    path = copied / "out" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in error_of(copied, root, "--resume")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["data.crop=[49,64]"], "is smaller than the crop of 49×64"),
        (["data.crop=[49,64]", "--no-check"], "is smaller than the crop of 49×64"),
        (["data.name=cityscapes"], "is not laid out as Cityscapes"),
        (["data.train=all"], "CamVid has no split 'all'"),
        (["model.backbone=resnet"], "cannot build the network of the configuration: timm"),
        (["model.attention_options={shape: 3}"], "cannot build the network"),
        (["model.backbone_weights=gone.npz"], "file gone.npz does not exist"),
        (["training.sync_batchnorm=true"], "no GPU is available: expected training.sync_batch"),
        (["training.precision=16-mixed"], "32-true or bf16-mixed, got False and 16-mixed"),
        (["--attention", "some"], "some"),
        (["--accumulate", "3"], "training.batch_size: expected a multiple of 3 "),
        (["--accumulate", "0"], "training.accumulate should be greater than 0, got 0"),
        (["--devices", "4"], "training.batch_size: expected a multiple of 4 "),
        (["--strategy", "fsdp", "training.average_decay=0"], "got 0.0 and 32-true"),
        (["--strategy", "fsdp", "training.precision=64-true"], "got None and 64-true"),
        (["training.step=3"], "did you mean 'training.steps'"),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of it can be done on a GPU")
def test_invalid_settings_are_reported_before_anything_is_written(
    arguments: list[str], reason: str, root: Path, tmp_path: Path
) -> None:
    assert reason in error_of(tmp_path, root, *arguments)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named_before_the_first_step(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    masks = sorted((copy / "labels" / "train").iterdir())
    labels = np.asarray(Image.open(masks[0])).copy()
    labels[0, 0] = 99
    Image.fromarray(labels).save(masks[0])
    assert (
        f"{masks[0]} has invalid labels for camvid: expected 0 to 10 and 255, got 99"
        in error_of(tmp_path, copy)
    )
    photo = sorted((copy / "images" / "val").iterdir())[1]
    photo.write_bytes(photo.read_bytes()[:500])
    masks[2].unlink()
    assert str(masks[2].with_suffix("").name) in error_of(tmp_path, copy)
    status, printed = train(tmp_path, copy, "--skip-bad")
    assert status == 0, printed
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 3
    assert "3 files were skipped" in printed
    for name in (masks[0].name, photo.name):
        assert any(name in line for line in listed)
    # Without --skip-bad they are errors again.
    shutil.rmtree(tmp_path / "out")
    assert str(photo) in error_of(tmp_path, copy, "data.train=test")


def test_images_smaller_than_the_crop_are_padded_with_pad(root: Path, tmp_path: Path) -> None:
    wide = ("data.crop=[64,64]", "data.pad=true", "training.steps=1", "data.val=null")
    status, printed = train(tmp_path, root, *wide)
    assert status == 0, printed


def _trainer(step: int, **values: float) -> SimpleNamespace:
    metrics = {"train/loss": torch.tensor(0.51234)} | {f"val/{k}": v for k, v in values.items()}
    return SimpleNamespace(global_step=step, max_steps=40000, callback_metrics=metrics)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_one_line_that_fits(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(fit, "time", SimpleNamespace(monotonic=lambda: now[0]))
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal)
    said: list[str] = []
    monkeypatch.setattr(Status, "update", lambda self, text: said.append(text))
    progress = fit.Progress(console, every=100, batch_size=8)
    progress.on_train_start(_trainer(0), None)
    for step in (0, 50, 100):
        now[0] = step
        progress.on_train_batch_end(_trainer(step))
    progress.on_validation_start(_trainer(100), None)
    now[0] = 1000
    progress.on_validation_end(_trainer(100, mean_iou=0.4), None)
    now[0] = 1100
    progress.on_train_batch_end(_trainer(200, mean_iou=0.4))
    progress.teardown(_trainer(200), None, "fit")
    printed = [line for line in console.file.getvalue().splitlines() if line.startswith("step")]
    first = "step 50/40000, loss 0.5123, 8.00 images/s, 11:05:50 left"
    second = "step 100/40000, loss 0.5123, 8.00 images/s, 11:05:00 left"
    third = "step 200/40000, loss 0.5123, mIoU 0.4000, 8.00 images/s, 11:03:20 left"
    if terminal:
        assert said == [first, second, "step 100/40000, evaluating", third]
    else:
        assert printed == [second, "step 100/40000, val mIoU 0.4000", third]
    assert max(map(len, said + printed)) < 80
