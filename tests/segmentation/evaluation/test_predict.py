"""Overlays, label images and similarity maps, and `fullattn predict`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fullattn._cli.errors import UsageError
from fullattn.segmentation.evaluation import segment
from fullattn.segmentation.evaluation.loop import normalised
from fullattn.segmentation.evaluation.overlay import overlay, palette_image
from fullattn.segmentation.models.files import load
from helpers import tiny_data
from helpers.command_line import run_command
from helpers.tiny_network import CLASSES, MEAN, PALETTE, STD, save, street


def _photograph(height: int = 24, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


def _labels(height: int = 24, width: int = 40) -> Tensor:
    labels = torch.zeros(height, width, dtype=torch.uint8)
    labels[:, width // 2 :] = 2
    labels[0, 0] = 255
    return labels


# Overlays


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_overlay_blends_each_pixel_with_its_classs_colour(alpha: float) -> None:
    photograph, labels = _photograph(), _labels()
    picture = np.asarray(overlay(photograph, labels, PALETTE, CLASSES, alpha))
    expected = photograph.permute(1, 2, 0).numpy().astype(float)
    for label, colour in enumerate(PALETTE):
        where = labels.numpy() == label
        expected[where] = (1 - alpha) * expected[where] + alpha * np.array(colour)
    # The pixel of no class, at the corner, is as it was.
    assert np.abs(picture[:24, :40] - expected).max() <= 0.5001
    assert (picture[0, 0] == photograph[:, 0, 0].numpy()).all()


def _colours(picture: Image.Image, top: int) -> set[tuple[int, ...]]:
    below = Image.fromarray(np.asarray(picture)[top:])
    return {colour for _, colour in below.getcolors(below.width * below.height)}


def test_the_legend_shows_only_the_classes_in_the_image() -> None:
    picture = overlay(_photograph(), _labels(), PALETTE, CLASSES)
    found = _colours(picture, 24)
    assert {PALETTE[0], PALETTE[2], (255, 255, 255)} <= found
    assert PALETTE[1] not in found


def test_the_legend_names_each_class_with_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageDraw

    texts = []
    write = ImageDraw.ImageDraw.text

    def noting(self: Any, place: Any, text: str, *rest: Any) -> None:
        texts.append(text)
        write(self, place, text, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noting)
    labels = torch.zeros(30, 40, dtype=torch.uint8)
    labels[:, :10] = 2
    labels[0, 0] = 1
    overlay(_photograph(30, 40), labels, PALETTE, CLASSES)
    assert texts == ["Sky 75%", "Road <1%", "Pole 25%"]


def test_a_legend_of_many_classes_stays_inside_the_picture() -> None:
    names = [f"a class with a long name {i}" for i in range(150)]
    palette = [(i, 255 - i, 3) for i in range(150)]
    labels = torch.arange(150, dtype=torch.uint8).repeat(200, 2)
    picture = overlay(_photograph(200, 300), labels, palette, names)
    assert set(palette) <= _colours(picture, 200)
    # White to the edge on every side: nothing is cut off.
    pixels = np.asarray(picture)
    assert (pixels[200:, -1] == 255).all()
    assert (pixels[-1] == 255).all()
    # And no entry lies upon another: each square has all of its pixels.
    legend = Image.fromarray(pixels[200:])
    counted = {colour: count for count, colour in legend.getcolors(legend.width * legend.height)}
    assert len({counted[colour] for colour in palette}) == 1


def test_a_photograph_narrower_than_its_legend_is_not_scaled() -> None:
    photograph = _photograph(3, 2)
    picture = overlay(photograph, torch.zeros(3, 2), PALETTE, CLASSES, alpha=0)
    assert picture.width > 40
    assert (np.asarray(picture)[:3, :2] == photograph.permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": 1.5}, "alpha from 0 to 1, got 1.5"),
        ({"alpha": float("nan")}, "alpha from 0 to 1, got nan"),
        ({"palette": PALETTE[:2]}, "a colour for each of 3 classes, got 2"),
        ({"labels": torch.zeros(24, 41)}, r"labels of shape \(24, 40\), got \(24, 41\)"),
        ({"image": torch.zeros(3, 24, 40)}, "a uint8 image"),
    ],
)
def test_invalid_overlay_arguments_raise(change: dict[str, Any], said: str) -> None:
    arguments = {
        "image": _photograph(),
        "labels": _labels(),
        "palette": PALETTE,
        "classes": CLASSES,
    }
    with pytest.raises(ValueError, match=said):
        overlay(**{**arguments, **change})


def test_a_palette_image_holds_indices_and_shows_colours(tmp_path: Path) -> None:
    labels = _labels()
    palette_image(labels, PALETTE).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        assert (np.asarray(picture) == labels.numpy()).all()
        assert picture.convert("RGB").getpixel((39, 23)) == PALETTE[2]


# fullattn predict


_run = partial(run_command, "predict")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def of(attention: str) -> Path:
        path = folder / f"{attention}.ckpt"
        return path if path.exists() else save(path, attention)

    return of


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    tiny_data.save(path, street().permute(1, 2, 0).numpy())
    return path


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {}),
        (
            ["--scales", "0.5", "1", "--flip", "--window", "24x32", "--stride", "20x32"],
            {"scales": (0.5, 1.0), "flip": True, "window": (24, 32), "stride": (20, 32)},
        ),
    ],
)
def test_the_labels_are_the_most_probable_classes(
    arguments: list[str],
    options: dict[str, Any],
    checkpoint: Callable[[str], Path],
    photo: Path,
    tmp_path: Path,
) -> None:
    file = checkpoint("fully")
    _run(photo, "--checkpoint", file, "--output", "out", "--labels", "--alpha", "0.25", *arguments)
    assert _names(tmp_path / "out") == ["street_labels.png", "street_overlay.png"]
    photograph = street()
    images = normalised(photograph[None], MEAN, STD)
    expected = segment(load(file).model, images, **options)[0].argmax(0)
    assert len(expected.unique()) > 1
    with Image.open("out/street_labels.png") as picture:
        assert (np.asarray(picture) == expected.numpy()).all()
    with Image.open("out/street_overlay.png") as picture:
        drawn = overlay(photograph, expected, PALETTE, CLASSES, 0.25)
        assert (np.asarray(picture) == np.asarray(drawn)).all()


@pytest.mark.parametrize(
    ("attention", "at_point", "at_channel"),
    [
        ("fully", [""], [""]),
        ("channel", [""], [""]),
        ("spatial", [""], None),
        ("dual", ["_channel", "_spatial"], ["_channel"]),
    ],
)
def test_maps_are_drawn_of_each_layer_that_has_them(
    attention: str,
    at_point: list[str],
    at_channel: list[str] | None,
    checkpoint: Callable[[str], Path],
    photo: Path,
    tmp_path: Path,
) -> None:
    given = [photo, "--checkpoint", checkpoint(attention), "--maps"]
    _run(*given, "--output", "at_point", "--point", "79,47")
    maps_of = [f"street_point_79_47{layer}.png" for layer in at_point]
    assert _names(tmp_path / "at_point") == ["street_overlay.png", *maps_of]
    if at_channel is None:
        with pytest.raises(
            UsageError, match="expected a layer with a map of channels, got only SpatialNonLocal"
        ):
            _run(*given, "--output", "at_channel", "--channel", "7")
        assert not Path("at_channel").exists()
        return
    _run(*given, "--output", "at_channel", "--channel", "7")
    maps_of = [f"street_channel_7{layer}.png" for layer in at_channel]
    assert _names(tmp_path / "at_channel") == sorted(["street_overlay.png", *maps_of])


def test_the_command_prints_the_written_files_and_keeps_other_files(
    checkpoint: Callable[[str], Path],
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    second = photo.with_name("square.jpg")
    tiny_data.save(second, _photograph(16, 16).permute(1, 2, 0).numpy())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    _run(photo, second, "--checkpoint", checkpoint("none"), "--output", "out")
    assert capsys.readouterr().out.split() == ["out/street_overlay.png", "out/square_overlay.png"]
    assert _names(tmp_path / "out") == ["mine.txt", "square_overlay.png", "street_overlay.png"]


Given = Callable[[Callable[[str], Path], Path], list[Any]]


def _other(photo: Path, name: str, content: bytes | None = None) -> Path:
    path = photo.parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(photo.read_bytes() if content is None else content)
    return path


BAD: dict[str, tuple[Given, str]] = {
    "no photograph": (lambda c, p: [p, "no.png", "--checkpoint", c("fully")], "no.png does not"),
    "half a photograph": (
        lambda c, p: [p, _other(p, "half.png", p.read_bytes()[:500]), "--checkpoint", c("fully")],
        "half.png cannot be read: it is truncated",
    ),
    "text for a photograph": (
        lambda c, p: [_other(p, "a.png", b"text"), "--checkpoint", c("fully")],
        "a.png cannot be read",
    ),
    "the same files": (
        lambda c, p: [p, _other(p, "other/street.png"), "--checkpoint", c("fully")],
        "street.png and .*other/street.png would be written to the same files",
    ),
    "a point outside the second photograph": (
        lambda c, p: [
            *(p, _other(p, "b.png", _png(20, 20)), "--checkpoint", c("fully")),
            *("--maps", "--point", "60,10"),
        ],
        "b.png: expected a point inside the 20x20 photograph, .* got 60,10",
    ),
    "no such channel": (
        lambda c, p: [p, "--checkpoint", c("fully"), "--maps", "--channel", "8"],
        "a channel from 0 to 7, got 8",
    ),
    "attention none": (
        lambda c, p: [p, "--checkpoint", c("none"), "--maps", "--channel", "1"],
        "the network's attention, 'none', has no similarity maps",
    ),
    "attention convolution": (
        lambda c, p: [p, "--checkpoint", c("convolution"), "--maps", "--point", "1,1"],
        "the network's attention, 'convolution', has no similarity maps",
    ),
    "maps of nothing": (
        lambda c, p: [p, "--checkpoint", c("fully"), "--maps"],
        "expected --point X,Y or --channel C with --maps",
    ),
    "a point without maps": (
        lambda c, p: [p, "--checkpoint", c("fully"), "--point", "1,1"],
        "expected --maps",
    ),
    "no checkpoint": (lambda c, p: [p, "--checkpoint", "no.ckpt"], "at 'no.ckpt'"),
    "a photograph for a checkpoint": (lambda c, p: [p, "--checkpoint", p], "street.png"),
    "alpha": (lambda c, p: [p, "--checkpoint", c("fully"), "--alpha", "2"], "alpha from 0 to 1"),
    "scale": (lambda c, p: [p, "--checkpoint", c("fully"), "--scales", "-1"], "scales above 0"),
    "window": (
        lambda c, p: [p, "--checkpoint", c("fully"), "--window", "0x8"],
        "a window of two lengths of at least 1",
    ),
    "damaged weights": (
        lambda c, p: [p, "--checkpoint", _not_a_number(c("fully"))],
        "the network's output is nan",
    ),
}


def _png(height: int, width: int) -> bytes:
    import io

    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def _not_a_number(path: Path) -> Path:
    contents = torch.load(path, weights_only=True)
    for tensor in contents["state_dict"].values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    torch.save(contents, "nan.ckpt")
    return Path("nan.ckpt")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_one_line_error_and_nothing_is_written(
    case: str, checkpoint: Callable[[str], Path], photo: Path
) -> None:
    arguments, said = BAD[case]
    given = arguments(checkpoint, photo)
    with pytest.raises(UsageError, match=said) as raised:
        _run(*given, "--output", "new/out")
    assert "\n" not in str(raised.value)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--point", "8"], "expected X,Y such as 320,240, got '8'"),
        (["--point", "-1,3"], "--point"),
        (["--channel", "1.5"], "expected a whole number from 0, got '1.5'"),
        (["--channel", "1", "--point", "1,1"], "not allowed with"),
        (["--alpha", "nan"], "expected a number, got 'nan'"),
    ],
)
def test_bad_arguments_are_a_one_line_error(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        _run("a.png", "--checkpoint", "c", "--output", "o", "--maps", *arguments)
    assert raised.value.code == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
