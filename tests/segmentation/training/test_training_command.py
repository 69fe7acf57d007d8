"""`fullattn train` from its arguments to files, and what it says where it cannot do it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fullattn.segmentation.training.config import read
from helpers import tiny_data
from helpers.tiny_training import processes

pytestmark = pytest.mark.slow

# A FLANet of some seconds.
SETTINGS = (
    "training.steps=2",
    "training.batch_size=2",
    "data.crop=[32,48]",
    "data.workers=0",
    "model.channels=8",
    "model.out_channels=8",
    "model.auxiliary_channels=8",
)


def _command(said: Path, arguments: list[str]) -> None:
    """What a process does: the command line, with its output in a file."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        from fullattn._cli.arguments import Parser
        from fullattn._cli.errors import UsageError
        from fullattn.segmentation.training.command import configure

        parser = Parser(prog="fullattn")
        configure(parser)
        try:
            args = parser.parse_args(arguments)
            args.run(args)
        except UsageError as error:
            file.write(f"fullattn: {error}\n")
            sys.exit(2)


def command(folder: Path, *arguments: object) -> tuple[int, str]:
    """Run `fullattn train` with these arguments; its exit status and all that it said."""
    said = folder / "said"
    process = processes().Process(target=_command, args=(said, [*map(str, arguments)]))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, said.read_text()


def train(folder: Path, root: Path, *arguments: object) -> tuple[int, str]:
    """Train in `folder`/out as in most tests here."""
    settings = [each for each in map(str, arguments) if "=" in each]
    flags = [each for each in map(str, arguments) if "=" not in each]
    common = ("camvid_small", "--data", root, "--output", folder / "out", *flags)
    return command(folder, *common, "--set", *SETTINGS, *settings)


def refusal(folder: Path, root: Path, *arguments: object) -> str:
    """The one sentence of a run that is refused."""
    status, said = train(folder, root, *arguments)
    assert status == 2, said
    sentence = said.splitlines()[-1]
    assert sentence.startswith("fullattn: ")
    assert "Traceback" not in said
    assert "step 1/" not in said
    return sentence


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.camvid(tmp_path_factory.mktemp("data"), images=4)


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    status, said = train(folder, root)
    assert status == 0, said
    return folder / "out"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A folder with a finished run in out/."""
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


def test_a_finished_run_is_refused_and_left_alone_unless_resumed(copied: Path, root: Path) -> None:
    before = (copied / "out" / "last.ckpt").read_bytes()
    assert "holds files: continue its run with --resume" in refusal(copied, root)
    status, said = train(copied, root, "--resume")
    assert status == 0, said
    assert "step 2:" in said
    assert (copied / "out" / "last.ckpt").read_bytes() == before


def test_a_run_without_a_checkpoint_begins_when_resumed(root: Path, tmp_path: Path) -> None:
    status, said = train(tmp_path, root, "--resume", "training.steps=1", "data.val=null")
    assert status == 0, said
    assert "starts at the first step" in said
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
    sentence = refusal(copied, root, *arguments, "--resume")
    assert reason in sentence
    assert str(copied / "out" / "last.ckpt") in sentence
    assert (copied / "out" / "config.yaml").read_bytes() == config


def folder_data(root: Path, size: tuple[int, int] = (48, 64)) -> Path:
    """Images and masks of three classes."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(3):
            image, mask = tiny_data.picture(size, [0, 1, 2], random)
            tiny_data.save(root / "images" / split / f"{i}.png", image)
            tiny_data.save(root / "masks" / split / f"{i}.png", mask)
    return root


def test_other_data_cannot_be_resumed(copied: Path, tmp_path: Path) -> None:
    other = folder_data(tmp_path / "other")
    sentence = refusal(copied, other, "data.name=folder", "--resume")
    assert "data.name camvid, and this run has folder" in sentence


def test_other_classes_of_a_folder_cannot_be_resumed(tmp_path: Path) -> None:
    root = folder_data(tmp_path / "data")
    settings = ("data.name=folder", "training.steps=1", "data.val=null")
    status, said = train(tmp_path, root, *settings)
    assert status == 0, said
    (root / "classes.txt").write_text("zero\nother\ntwo\n")
    sentence = refusal(tmp_path, root, *settings, "--resume")
    assert "it was saved with class " in sentence
    assert "and this run has zero" in sentence


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_damaged_checkpoint_cannot_be_resumed(size: int, copied: Path, root: Path) -> None:
    path = copied / "out" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:size])
    assert str(path) in refusal(copied, root, "--resume")


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
        (
            ["training.sync_batchnorm=true"],
            "no GPU is available: expected training.sync_batchnorm=false",
        ),
        (["training.precision=16-mixed"], "32-true or bf16-mixed, got False and 16-mixed"),
        (["--attention", "some"], "some"),
        (
            ["--accumulate", "3"],
            "training.batch_size: expected a multiple of 3 ",
        ),
        (["--devices", "4"], "training.batch_size: expected a multiple of 4 "),
        (
            ["--strategy", "fsdp", "training.average_decay=0.9"],
            "fsdp: expected training.average_decay=null",
        ),
        (["training.step=3"], "did you mean 'steps'"),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of it can be done on a GPU")
def test_what_cannot_be_done_is_said_before_anything_is_written(
    arguments: list[str], reason: str, root: Path, tmp_path: Path
) -> None:
    assert reason in refusal(tmp_path, root, *arguments)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_named_before_the_first_step(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    masks = sorted((copy / "labels" / "train").iterdir())
    labels = np.asarray(Image.open(masks[0])).copy()
    labels[0, 0] = 99
    Image.fromarray(labels).save(masks[0])
    assert f"{masks[0]} has invalid labels for camvid: expected 0 to 10 and 255, got 99" in refusal(
        tmp_path, copy
    )
    photo = sorted((copy / "images" / "val").iterdir())[1]
    photo.write_bytes(photo.read_bytes()[:500])
    masks[2].unlink()
    assert str(masks[2].with_suffix("").name) in refusal(tmp_path, copy)
    status, said = train(tmp_path, copy, "--skip-bad")
    assert status == 0, said
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 3
    assert "3 files were skipped" in said
    for name in (masks[0].name, photo.name):
        assert any(name in line for line in listed)
    # None of it once more, and nothing of it left out silently.
    shutil.rmtree(tmp_path / "out")
    assert str(photo) in refusal(tmp_path, copy, "data.train=test")


def test_images_smaller_than_the_crop_are_filled_up_on_request(root: Path, tmp_path: Path) -> None:
    wide = ("data.crop=[64,64]", "data.pad=true", "training.steps=1", "data.val=null")
    status, said = train(tmp_path, root, *wide)
    assert status == 0, said


def test_the_command_line_is_there_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys\n"
        "from fullattn._cli.arguments import Parser\n"
        "from fullattn.segmentation.training.command import configure\n"
        "configure(Parser())\n"
        "heavy = {'lightning', 'pydantic', 'timm', 'yaml'}\n"
        "print(heavy & set(sys.modules))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
