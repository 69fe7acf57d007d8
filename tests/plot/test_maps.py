"""`fullattn maps`: its files, its layers and its errors."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from fullattn import ChannelNonLocal
from fullattn._cli.main import main
from fullattn.integrations.torchvision import ensure_importable
from fullattn.layers import LAYERS
from fullattn.segmentation.data.decode import read_image, read_scaled
from fullattn.segmentation.data.files import DataError
from fullattn.segmentation.evaluation import maps
from fullattn.segmentation.models.files import load
from helpers import tiny_data, tiny_network
from helpers.processes import run_program


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "street.png"
    pixels, _ = tiny_data.picture((48, 80), list(range(9)), np.random.default_rng(0))
    tiny_data.save(path, pixels)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def of(attention: str) -> Path:
        path = folder / f"{attention}.ckpt"
        return path if path.exists() else tiny_network.save(path, attention)

    return of


def _timm() -> Any:
    """Timm, whose torchvision may have to be made importable first."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm")
    ensure_importable()
    return importlib.import_module("timm")


def _written(folder: str = "out/maps") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def _data(path: Path) -> dict[str, Any]:
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S
    )
    return dict(json.loads(found))


def test_without_options_it_draws_all_three_layers_and_the_page(
    photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["maps", str(photo)]) == 0
    names = [f"street_{name}" for name in ("fully.png", "channel.png", "spatial.png", "maps.html")]
    assert _written() == sorted(names)
    assert capsys.readouterr().out.split() == [f"out/maps/{name}" for name in names]
    data = _data(Path("out/maps/street_maps.html"))
    assert data["point"] == [40, 24]
    assert [layer["form"] for layer in data["layers"]] == ["slices", "channels", "positions"]
    for name in names[:-1]:
        with Image.open(Path("out/maps") / name) as picture:
            assert min(picture.size) > 300


def test_the_options_reach_the_drawing(photo: Path) -> None:
    options = "--layers fully,channel --channels 8 --seed 3 --scale 0.5 --point 79,0 --channel 7"
    assert main(["maps", str(photo), "--output", "o", *options.split()]) == 0
    assert _written("o") == [
        "street_channel.png",
        "street_channel_channel_7.png",
        "street_fully.png",
        "street_fully_channel_7.png",
        "street_maps.html",
    ]
    data = _data(Path("o/street_maps.html"))
    assert data["point"] == [79, 0]
    fully, channel = data["layers"]
    assert fully["channels"] == channel["channels"] == 8
    assert fully["factor"] == 0.5
    seen = maps.of_stem(maps.read(photo, 512), ["channel"], 8, 0.5, 3)
    layer, features = seen.layers["channel"]
    found = np.frombuffer(base64.b64decode(data["tensors"][channel["map"]]), "<f4")
    np.testing.assert_allclose(
        found.reshape(8, 8), layer.similarity(features)[0].detach(), rtol=1e-5, atol=1e-8
    )
    assert isinstance(layer, ChannelNonLocal)
    assert layer.scale == 0.5


def test_untrained_layers_compare_the_features_themselves(photo: Path) -> None:
    seen = maps.of_stem(maps.read(photo, 512), list(LAYERS), 6, None, 0)
    features = seen.layers["fully"][1][0].double().numpy()
    c, h, w = features.shape
    np.testing.assert_allclose(features.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(features.std((1, 2)), 1, rtol=1e-3)

    def softmax(scores: Any) -> Any:
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    flat = features.reshape(c, h * w)
    with torch.no_grad():
        found = {name: layer.similarity(x) for name, (layer, x) in seen.layers.items()}
    np.testing.assert_allclose(found["channel"][0], softmax(4 * flat @ flat.T / (h * w)), rtol=1e-4)
    np.testing.assert_allclose(found["spatial"][0], softmax(4 * flat.T @ flat / c), rtol=1e-3)
    column = softmax(4 * features[:, :, 3] @ features.mean(2).T / (h * w) ** 0.5)
    np.testing.assert_allclose(found["fully"].columns[0, 3], column, rtol=1e-4)
    row = softmax(4 * features[:, 2] @ features.mean(1).T / (h * w) ** 0.5)
    np.testing.assert_allclose(found["fully"].rows[0, 2], row, rtol=1e-4)
    assert seen.beside is not None
    assert seen.beside.scale == pytest.approx(4 / (h * w))


def _figures(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[Figure]:
    """Run `fullattn maps`, and return the figures that it has written."""
    made: list[Figure] = []

    def save(figure: Figure, *_: Any, **__: Any) -> None:
        made.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    assert main(["maps", *arguments, "--output", str(folder)]) == 0
    return made


@pytest.mark.parametrize("trained", [False, True])
def test_pictures_and_page_say_untrained_where_the_layers_are(
    trained: bool,
    checkpoint: Callable[[str], Path],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--channel", "2", *(["--checkpoint", str(checkpoint("fully"))] if trained else [])]
    figures = _figures(tmp_path / "o", monkeypatch, str(photo), *options)
    assert len(figures) == (2 if trained else 5)  # at the point and at the channel
    stamps = {figure.get_supxlabel() for figure in figures}
    titles = [layer["title"] for layer in _data(tmp_path / "o" / "street_maps.html")["layers"]]
    if trained:
        assert stamps == {""}
        assert titles == ["FullyAttentional"]
        return
    assert stamps == {"untrained layer on random features"}
    assert len(titles) == 3
    assert all(title.endswith(", untrained layer on random features") for title in titles)
    for figure in figures:  # in the picture, and over none of its panels
        FigureCanvasAgg(figure).draw()
        (text,) = [each for each in figure.texts if "untrained" in each.get_text()]
        box = text.get_bbox_patch().get_window_extent()
        assert box.x0 >= 0 <= box.y0
        assert box.x1 <= figure.bbox.width
        assert not any(box.overlaps(panel.get_tightbbox()) for panel in figure.axes)


@pytest.mark.parametrize(
    ("attention", "names", "titles"),
    [
        ("fully", ["fully"], ["FullyAttentional"]),
        ("spatial", ["spatial"], ["SpatialNonLocal"]),
        ("dual", ["channel", "spatial"], ["ChannelNonLocal", "SpatialNonLocal"]),
    ],
)
def test_a_trained_networks_layers_are_drawn_for_their_inputs(
    attention: str,
    names: list[str],
    titles: list[str],
    checkpoint: Callable[[str], Path],
    photo: Path,
) -> None:
    file = checkpoint(attention)
    assert main(["maps", str(photo), "--checkpoint", str(file)]) == 0
    pictures = [f"street_{name}.png" for name in names]
    assert _written() == sorted([*pictures, "street_maps.html"])
    data = _data(Path("out/maps/street_maps.html"))
    assert sorted(layer["title"] for layer in data["layers"]) == titles
    trained = load(file)
    seen = maps.of_network(trained, maps.read(photo, 512))
    kept: list[torch.Tensor] = []
    part = trained.model.get_submodule("head.attention")
    part.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in (trained.description.mean, trained.description.std)
    )
    with torch.no_grad():
        trained.model((read_image(photo)[None].float() / 255 - mean) / std)
    for _, features in seen.layers.values():
        torch.testing.assert_close(features, kept[0])


@pytest.mark.slow
def test_a_backbones_features_are_those_of_stride_8(photo: Path) -> None:
    timm = _timm()
    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", features_only=True, pretrained=False)
    torch.save(backbone.state_dict(), "weights.pth")
    arguments = ["--backbone", "test_resnet", "--weights", "weights.pth"]
    assert main(["maps", str(photo), *arguments]) == 0
    data = _data(Path("out/maps/street_maps.html"))
    assert [(layer["height"], layer["width"]) for layer in data["layers"]] == [(6, 10)] * 3
    seen = maps.of_backbone(
        maps.read(photo, 512), ["fully"], "test_resnet", Path("weights.pth"), None
    )
    from fullattn.segmentation.data import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        stages = backbone.eval()((read_image(photo)[None].float() / 255 - mean) / std)
    (expected,) = [stage for stage in stages if stage.shape[-1] == 10]
    expected = (expected - expected.mean((0, 2, 3), keepdim=True)) / (
        expected.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
    ).sqrt()
    torch.testing.assert_close(seen.layers["fully"][1], expected, atol=1e-4, rtol=1e-4)


# Photographs


def test_a_large_photograph_is_scaled_down_with_a_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (300, 200), "red").save("large.png")
    assert main(["maps", "large.png", "--longest", "75", "--point", "299,199"]) == 0
    assert "large.png is scaled from 300x200 to 75x50" in capsys.readouterr().out
    text = Path("out/maps/large_maps.html").read_text("utf-8")
    assert "large.png is scaled from 300x200 to 75x50" in text
    data = _data(Path("out/maps/large_maps.html"))
    assert (data["width"], data["height"], data["point"]) == (300, 200, [299, 199])


def test_a_photograph_beyond_pillows_limit_is_scaled_down_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (400, 300), "red").save("huge.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert main(["maps", "huge.jpg", "--longest", "100"]) == 0
    assert "huge.jpg is scaled from 400x300 to 100x75" in capsys.readouterr().out
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_what_cannot_be_decoded_at_once_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fullattn.segmentation.data.decode._MAX_PIXELS", 30_000)
    Image.new("RGB", (800, 600)).save("huge.png")
    with pytest.raises(DataError, match=r"huge\.png has 800x600 pixels: expected at most"):
        read_scaled(Path("huge.png"), 100)
    # JPEG is decoded at a fraction of its size.
    Image.new("RGB", (800, 600)).save("huge.jpg")
    pixels, size = read_scaled(Path("huge.jpg"), 100)
    assert (tuple(pixels.shape), size) == ((3, 75, 100), (600, 800))


def test_a_photograph_is_rotated_by_its_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 48), "red").save("turned.jpg", exif=exif)
    pixels, size = read_scaled(Path("turned.jpg"), 40)
    assert (tuple(pixels.shape), size) == ((3, 40, 24), (80, 48))


def test_a_small_photograph_is_not_scaled(photo: Path) -> None:
    pixels, size = read_scaled(photo, 80)
    assert size == (48, 80)
    torch.testing.assert_close(pixels, read_image(photo))


# Bad input

Given = Callable[[Callable[[str], Path], Path], list[Any]]
BAD: dict[str, tuple[Given, str]] = {
    "no photograph": (lambda c, p: ["no.png"], "no.png does not exist"),
    "text for a photograph": (lambda c, p: [__file__], "cannot be read: not a valid image file"),
    "an empty file": (lambda c, p: [_file("empty.jpg", b"")], "empty.jpg cannot be read: the file"),
    "half a photograph": (
        lambda c, p: [_file("half.png", p.read_bytes()[:900])],
        "half.png cannot be read: it is truncated",
    ),
    "a tiny photograph": (lambda c, p: [_tiny()], "tiny.png is 15x90 pixels here; expected"),
    "a point outside": (lambda c, p: [p, "--point", "80,10"], "the 80x48 photograph, .* got 80,10"),
    "a point outside, scaled": (
        lambda c, p: [p, "--longest", "40", "--point", "10,48"],
        "inside the 80x48 photograph, .* got 10,48",
    ),
    "no such channel": (lambda c, p: [p, "--channel", "64"], "a channel from 0 to 63, got 64"),
    "a channel of positions": (
        lambda c, p: [p, "--layers", "spatial", "--channel", "1"],
        "a layer with a map of channels, got only SpatialNonLocal",
    ),
    "no such layer": (lambda c, p: [p, "--layers", "dual"], "layers of fully, .* got 'dual'"),
    "a network without maps": (
        lambda c, p: [p, "--checkpoint", c("none")],
        "the network's attention, 'none', has no similarity maps",
    ),
    "a layer of a checkpoint": (
        lambda c, p: [p, "--checkpoint", c("fully"), "--layers", "fully"],
        "expected no --layers with --checkpoint",
    ),
    "no checkpoint": (lambda c, p: [p, "--checkpoint", "no.ckpt"], "at 'no.ckpt'"),
    "a photograph for a checkpoint": (lambda c, p: [p, "--checkpoint", p], "street.png"),
    "weights of nothing": (lambda c, p: [p, "--weights", "w.pth"], "expected --backbone NAME"),
    "no weights": (
        lambda c, p: [p, "--backbone", "test_resnet", "--weights", "w.pth"],
        "expected weights at 'w.pth'",
    ),
    "another network's weights": (
        lambda c, p: [p, "--backbone", "test_resnet", "--weights", _other_weights()],
        "cannot load .* into FeatureListNet: ",
    ),
    "no such backbone": (
        lambda c, p: [p, "--backbone", "resnet5000"],
        "timm .* has no model 'resnet5000'",
    ),
    "channels of a backbone": (
        lambda c, p: [p, "--backbone", "test_resnet", "--channels", "3"],
        "expected no --channels with --backbone",
    ),
    "a file for a folder": (lambda c, p: [p, "--output", p], "an output folder"),
}


def _file(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


def _other_weights() -> str:
    torch.save({"conv.weight": torch.zeros(3)}, "other.pth")
    return "other.pth"


def _tiny() -> str:
    Image.new("RGB", (15, 90)).save("tiny.png")
    return "tiny.png"


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_is_an_error_of_one_line_and_nothing_is_written(
    case: str,
    checkpoint: Callable[[str], Path],
    photo: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, said = BAD[case]
    given = [str(each) for each in arguments(checkpoint, photo)]
    status = main(["maps", "--output", "new/out", *given])
    printed = capsys.readouterr().err
    assert status == 2
    assert re.search(said, printed), printed
    assert printed.count("\n") == 1
    assert not Path("new").exists()


def test_a_failed_download_is_an_error_of_one_line(
    photo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = _timm()

    def refuse(*_: Any, **__: Any) -> nn.Module:
        raise OSError("no connection\nand more")

    monkeypatch.setattr(timm, "create_model", refuse)
    assert main(["maps", str(photo), "--backbone", "resnet18"]) == 2
    assert (
        "could not download the weights of 'resnet18': no connection; give"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_error_without_matplotlib_names_the_extra(photo: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from fullattn._cli.main import main\n"
        f"sys.exit(main(['maps', {str(photo)!r}]))"
    )
    done = run_program(program)
    assert done.returncode == 2
    assert "pip install 'fullattn[plot]'" in done.stderr
    assert done.stderr.count("\n") == 1
