"""A layer in one file, registered: benched, costed, drawn, swapped in, explored, in a FLANet."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fullattn
from fullattn import costs
from fullattn._cli.main import main
from fullattn._versions import VERSION
from fullattn.attention import AttentionCall, BranchSizes, Operation
from fullattn.attention.dispatch import BACKENDS
from fullattn.layers import LAYERS, AttentionLayer, Work, register, unregister
from fullattn.reshape import ROWS, Cut
from helpers import ROOT, oracle, rows
from helpers.cases import SIZES, assert_near, peak_bytes
from helpers.page_script import PageScript, page_data, position_tokens

FILE = Path(rows.__file__)
SHAPE = (2, 8, 6, 7)


@pytest.fixture(scope="module")
def rows() -> Iterator[Any]:
    """The toy layer, registered while the tests of this file run."""
    from helpers import rows

    yield register(rows.RowAttention)
    unregister(rows.RowAttention)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def built(rows: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return rows(8, gamma_init=0.7, dtype=torch.float64, **options)


# Layer


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if b.unavailable() is None])
@given(height=st.sampled_from(SIZES), width=st.sampled_from(SIZES), seed=st.integers(0, 99))
def test_every_backend_that_can_runs_it_as_its_definition(
    rows: Any, backend: str, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 8, height, width, generator=generator, dtype=torch.float64)
    image.requires_grad_()
    layer = built(rows, scale=(1.0, -0.5)[seed % 2])
    inputs = costs.inputs_of(layer, image.shape, image.dtype, "cpu")
    (entry,) = (each for each in BACKENDS if each.name == backend)
    if entry.reasons_against(inputs):
        with pytest.raises(fullattn.BackendError), fullattn.backend(backend):
            layer(image)
        return
    with fullattn.backend(backend):
        y = layer(image)
    key = layer.key(image.mean(2).mT).mT
    maps = oracle.softmax(
        layer.scale * np.einsum("bihw,bjw->bhij", image.detach().numpy(), key.detach().numpy())
    )
    exact = np.einsum("bhij,bjhw->bihw", maps, image.detach().numpy())
    assert_near(y, 0.7 * exact + image.detach().numpy(), torch.float64)
    assert_near(layer.similarity(image), maps, torch.float64)
    (grad,) = torch.autograd.grad(y.square().sum(), image)
    with fullattn.backend("reference"):
        (expected,) = torch.autograd.grad(layer(image).square().sum(), image)
    assert_near(grad, expected, torch.float64)


def test_it_behaves_as_the_layers_of_the_package_do(rows: Any, x: Tensor) -> None:
    layer = built(rows, scale=0.5)
    assert repr(layer).startswith("RowAttention(\n  8, scale=0.5, gamma_init=0.7\n")
    assert_near(layer(x[0]), layer(x)[0], torch.float64)
    assert layer.similarity(x[0]).shape == (6, 8, 8)
    with pytest.raises(ValueError, match="expected 8 channels"):
        layer(x[:, :5])
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


# Everything that uses layers by their protocol


@pytest.mark.skipif(VERSION < (2, 6), reason="FlopCounterMode of 2.4 does not see our operators")
def test_its_costs_are_those_that_are_counted(rows: Any) -> None:
    layer, shape = rows(64), (2, 64, 26, 30)
    for entry in BACKENDS:
        inputs = costs.inputs_of(layer, shape, torch.float32, "cpu")
        if entry.reasons_against(inputs):
            continue
        cost = costs.cost(layer, shape, backend=entry.name)
        image = torch.randn(shape, requires_grad=True)
        with fullattn.backend(entry.name), FlopCounterMode(display=False) as counter:
            y = layer(image)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        assert cost.flops == counter.get_total_flops()
        assert cost.backward_flops == backward.get_total_flops()
        assert cost.parameters == sum(p.numel() for p in layer.parameters())
        assert cost.map_numel == layer.similarity(image).numel()
        found = cost.inference_bytes, cost.training_bytes
        assert found == pytest.approx(peak_bytes(layer, shape, entry.name, torch.float32), rel=0.15)


def test_it_is_benched_with_its_memory(rows: Any, tmp_path: Path) -> None:
    arguments = ["--layers", "rows", "--shape", "2x64x40x30", "--seconds", "0.01", "--budget", "60"]
    assert main(["bench", *arguments, "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "bench.json").read_text())
    found = {row["name"]: row for row in data["rows"]}
    assert set(found) >= {"official", "rows:chunked", "rows:reference"}
    for row in found.values():
        for mode in ("inference", "training"):
            assert row[mode]["failure"] is None
            assert row[mode]["peak_bytes"] > 0, row["name"]


def test_it_is_benched_and_explained_by_its_file_without_an_import(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "fullattn"]
    place = f"{FILE}:RowAttention"
    said = subprocess.run([*run, "info", "--layer", place], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "RowAttention at 512x97x97" in said.stdout
    assert "rows          RowAttention, none: a toy" in said.stdout
    assert (
        "native        cannot run: computes axial channel attention, not row attention"
        in said.stdout
    )
    layers = ["--layers", place, "--shape", "8x6x5", "--no-memory", "--seconds", "0.01"]
    command = [*run, "bench", *layers, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rows:" in (tmp_path / "bench.json").read_text()


def test_its_maps_are_drawn_at_a_point_and_at_a_channel(rows: Any, x: Tensor) -> None:
    layer = built(rows)
    figure = fullattn.plot.similarity(layer, x[0], point=(3, 2))
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes}
    shown = panels["map of row 2"].get_images()[0].get_array()
    np.testing.assert_allclose(shown, layer.similarity(x)[0, 2].detach(), rtol=1e-5, atol=1e-7)
    figure = fullattn.plot.similarity(layer, x[0], channel=4)
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes}
    shown = panels["channel 4 in each row"].get_images()[0].get_array()
    np.testing.assert_allclose(shown, layer.similarity(x)[0, :, 4].detach(), rtol=1e-5, atol=1e-7)


def test_its_maps_are_in_a_page_and_in_the_command(rows: Any, x: Tensor, tmp_path: Path) -> None:
    photograph = torch.zeros(3, 60, 70, dtype=torch.uint8)
    text = fullattn.plot.page({"rows": (built(rows), x[0])}, photograph)
    assert '"slices": "row"' in text
    from PIL import Image

    Image.fromarray(np.zeros((60, 70, 3), np.uint8)).save(tmp_path / "street.png")
    arguments = ["maps", str(tmp_path / "street.png"), "--layers", "rows", "--channels", "8"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "street_rows.png",
        "street_maps.html",
    }


class WithinRows(AttentionLayer):
    """Positions attend to the positions of their row: axial attention, without learned keys."""

    layer_name = "within_rows"
    paper = "none: a toy"
    operation = Operation(
        "attention within rows",
        similarity=lambda x, scale: torch.softmax(
            scale * torch.einsum("bchw, bchv -> bhwv", x, x), -1
        ),
        attended=lambda x, scale: torch.einsum(
            "bhwv, bchv -> bchw",
            torch.softmax(scale * torch.einsum("bchw, bchv -> bhwv", x, x), -1),
            x,
        ),
        cuts=(Cut("positions of rows", slices="h", tokens="w", features="c"),),
        branches=lambda x: ((x, x, x),),
    )

    def __init__(self, channels: int, *, scale: float = 1.0, backend: Any = None) -> None:
        super().__init__()
        self.channels, self.scale, self.backend = channels, scale, backend
        self.gamma = nn.Parameter(torch.zeros(1))

    def attention(self, x: Tensor) -> AttentionCall:
        return AttentionCall(self.operation, (x,), self.scale)

    def work(self, shape: Any, size: Any) -> Work:
        branches = (BranchSizes.of(self.operation.cuts[0], shape),)
        return Work(branches, flops=0, parameters=1, inputs=0, kept=0, gradients=0)


def test_without_a_gamma_a_layer_gives_what_is_attended(x: Tensor) -> None:
    layer, given = WithinRows(8, scale=0.3), x.float()
    with_gamma = layer(given)
    assert torch.equal(with_gamma, given)
    del layer.gamma
    expected = torch.einsum("bhwv, bchv -> bchw", layer.similarity(given), given)
    torch.testing.assert_close(layer(given), expected)


def test_positions_that_stay_within_rows_are_drawn_there(x: Tensor) -> None:
    layer, features = WithinRows(8, scale=0.3), x[0].float()
    figure = fullattn.plot.similarity(layer, features, point=(3, 2))
    (panel,) = (each for each in figure.axes if each.get_title(loc="left") == "where it looks")
    shown = np.asarray(panel.get_images()[1].get_array())
    expected = np.zeros((6, 7))
    expected[2] = layer.similarity(features)[2, 3].detach().numpy()
    np.testing.assert_allclose(shown, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="WithinRows has a map of positions and none of channels"):
        fullattn.plot.similarity(layer, features, channel=1)

    text = fullattn.plot.page({"a": (layer, features)}, torch.zeros(3, 60, 70, dtype=torch.uint8))
    data = page_data(text)
    (described,) = data["layers"]
    tokens = position_tokens(data, described, described["branches"][0])
    found = PageScript().call("positionWeights", tokens, [3, 2])
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-4, atol=1e-6)


def test_it_is_swapped_and_inserted(rows: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.ReLU())
    images = torch.randn(2, 3, 6, 7)
    before = model(images)
    fullattn.insert(model, rows, after="0")
    torch.testing.assert_close(model(images), before)
    fullattn.swap(model, "1", rows)
    assert isinstance(model[1], rows)
    model(images).sum().backward()
    assert model[1].gamma.grad is not None


def test_flanet_has_it_by_its_name(rows: Any) -> None:
    pytest.importorskip("timm", reason="timm is not installed", exc_type=Exception)
    assert fullattn.models.attentions()[3] == "rows"
    options: dict[str, Any] = {"channels": 8, "out_channels": 8, "auxiliary": False}
    network = fullattn.segmentation.models.FLANet(4, "test_resnet", attention="rows", **options)
    assert isinstance(network.head.attention, rows)
    assert network.eval()(torch.randn(1, 3, 32, 64)).shape == (1, 4, 32, 64)
    with pytest.raises(ValueError, match="did you mean 'rows'"):
        fullattn.segmentation.models.FLANet(4, "test_resnet", attention="row", **options)


def test_the_explorer_has_its_formulas(rows: Any) -> None:
    racer = pytest.importorskip("py_mini_racer", reason="needs mini-racer: a V8 to run scripts in")

    import explorer

    context = racer.MiniRacer()
    script = ROOT / "docs" / "javascripts" / "costs.js"
    context.eval(explorer.script() + script.read_text("utf-8"))
    setting: dict[str, Any] = {"layer": "rows", "batch": 2, "channels": 24, "height": 9}
    setting |= {"width": 11, "dtype": "float32", "device": "cpu", "threads": 2, "project": False}
    for backend in ("automatic", "reference", "sdpa", "chunked"):
        asked = json.dumps(setting | {"backend": backend})
        found = json.loads(context.eval(f"JSON.stringify(fullattnCosts.cost({asked}))"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 2)
            name = None if backend == "automatic" else backend
            expected = costs.cost(rows(24), (2, 24, 9, 11), backend=name)
        assert found == vars(expected)
    asked = json.dumps(setting | {"backend": "native"})
    found = json.loads(context.eval(f"JSON.stringify(fullattnCosts.cost({asked}))"))
    assert found == {"reason": "native computes axial channel attention, not row attention"}


def test_timm_is_told_of_it(rows: Any) -> None:
    pytest.importorskip("timm", reason="timm is not installed", exc_type=Exception)
    from fullattn.integrations import timm

    timm.register()
    from timm.layers import get_notrace_modules

    assert rows in get_notrace_modules()


# What is not a whole layer


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("layer_name", "a `layer_name`"),
        ("paper", "a `paper`"),
        ("operation", "an `operation`"),
        ("attention", "the method `attention`"),
        ("work", "the method `work`"),
    ],
)
def test_a_layer_that_lacks_a_part_is_refused_with_its_name(
    rows: Any, without: str, said: str
) -> None:
    names = {
        name: getattr(rows, name)
        for name in ("paper", "operation", "attention", "work", "__init__")
        if name != without
    }
    if without != "layer_name":
        names["layer_name"] = "incomplete"
    incomplete = type("Incomplete", (AttentionLayer,), names)
    with pytest.raises(TypeError) as caught:
        register(incomplete)
    message = str(caught.value)
    assert message.startswith(f"cannot register Incomplete: it lacks {said}")
    assert "\n" not in message
    assert ";" not in message
    assert "incomplete" not in LAYERS


def test_other_mistakes_of_registration(rows: Any) -> None:
    with pytest.raises(TypeError, match="expected a subclass of AttentionLayer, got"):
        register(nn.Conv2d)  # type: ignore[type-var]
    taken = type("Taken", (rows,), {"layer_name": "fully"})
    with pytest.raises(ValueError, match="cannot register Taken: FullyAttentional has the name"):
        register(taken)
    named = type("Named", (rows,), {"layer_name": "Two words"})
    with pytest.raises(TypeError, match=r"a `layer_name` of lower-case .* \(got 'Two words'\)"):
        register(named)
    options = type("Optioned", (rows,), {"layer_name": "o", "head_options": {"prject": False}})
    with pytest.raises(TypeError, match="options 'prject' of `head_options`"):
        register(options)

    def __init__(self: Any, width: int, scale: float = 1.0) -> None:  # noqa: N807
        raise NotImplementedError

    unusual = type("Unusual", (rows,), {"layer_name": "u", "__init__": __init__})
    with pytest.raises(TypeError) as caught:
        register(unusual)
    for part in ("`channels` as first argument", "the keyword `scale`", "the keyword `backend`"):
        assert part in str(caught.value)
    assert "u" not in LAYERS


def test_bad_layers_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.py").write_text(
        "from fullattn.layers import AttentionLayer\nclass Half(AttentionLayer):\n    paper = 'x'\n"
    )
    for layer, said in (
        ("nothing", "expected layers of fully, channel, spatial"),
        (f"{tmp_path}/bad.py:Half", "cannot register Half: it lacks a `layer_name`"),
        ("torch.nn:Conv2d", "expected a subclass of AttentionLayer, got"),
        ("nowhere.py:A", "expected a file at 'nowhere.py'"),
    ):
        assert main(["info", "--layer", layer]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1


def test_rows_are_a_cut_of_the_package(rows: Any) -> None:
    assert rows.operation.cuts == (ROWS,)
