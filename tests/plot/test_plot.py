"""Figures and pages show the similarity maps that the layers compute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

import fullattn
from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal
from fullattn.plot import figures, inputs_of, layers_with_maps, page, similarity
from helpers.page_script import PageScript, page_data, page_tensor, position_tokens


def _photograph(height: int = 24, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)


# Layers and their inputs


def test_layers_with_maps_are_found_in_any_container() -> None:
    channel, spatial = ChannelNonLocal(4), SpatialNonLocal(4)
    assert layers_with_maps(channel) == {"": channel}
    inside = nn.Sequential(nn.ReLU(), nn.Sequential(channel, nn.Conv2d(4, 4, 1)), spatial)
    assert layers_with_maps(inside) == {"1.0": channel, "2": spatial}
    assert layers_with_maps(nn.Identity()) == {}


def test_inputs_are_captured_and_the_hooks_removed() -> None:
    first, second = ChannelNonLocal(4, gamma_init=1), SpatialNonLocal(4)
    stem = nn.Conv2d(3, 4, 3, stride=2)
    model = nn.Sequential(stem, first, second)
    images = torch.randn(1, 3, 11, 9)
    inputs = inputs_of(model, {"first": first, "second": second}, images)
    assert torch.equal(inputs["first"], stem(images))
    assert torch.equal(inputs["second"], first(stem(images)))
    assert not inputs["first"].requires_grad
    assert not first._forward_pre_hooks
    with pytest.raises(ValueError, match="did not call its layers 'other'"):
        inputs_of(model, {"other": ChannelNonLocal(4)}, images)


# Maps

MODES = ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
FEATURES = torch.randn(1, 6, 5, 7, generator=torch.Generator().manual_seed(0))
# At column 4 and row 3 of the 7 x 5 positions on 40 x 24 pixels.
POINT, COLUMN, ROW = (25, 18), 4, 3


def _shown(figure: Figure, title: str) -> np.ndarray[Any, Any]:
    """The values of the last picture in the panel of a title."""
    (panel,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    return np.asarray(panel.images[-1].get_array())


def _layer(kind: type[nn.Module], **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(6, **options).eval()


@pytest.mark.parametrize("subsample", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_spatial_layers_figure_shows_the_points_row_of_its_map(subsample: int, mode: str) -> None:
    layer = _layer(SpatialNonLocal, subsample=subsample, mode=mode)
    figure = similarity(layer, FEATURES, _photograph(), point=POINT)
    row = layer.similarity(FEATURES)[0, ROW * 7 + COLUMN].detach().numpy()
    expected = row.reshape(5 // subsample, 7 // subsample)
    np.testing.assert_allclose(_shown(figure, "where it looks"), expected, rtol=1e-5, atol=1e-8)


def test_a_fully_attentional_layers_figure_shows_the_points_column_and_row() -> None:
    layer = _layer(FullyAttentional)
    figure = similarity(layer, FEATURES, _photograph(), point=POINT)
    columns, rows = (each.detach().numpy() for each in layer.similarity(FEATURES))
    np.testing.assert_array_equal(_shown(figure, f"map of column {COLUMN}"), columns[0, COLUMN])
    np.testing.assert_array_equal(_shown(figure, f"map of row {ROW}"), rows[0, ROW])


def test_a_channel_layers_figure_shows_its_map_at_any_point() -> None:
    layer = _layer(ChannelNonLocal)
    figure = similarity(layer, FEATURES, _photograph(), point=POINT)
    np.testing.assert_array_equal(
        _shown(figure, "map of the whole image"), layer.similarity(FEATURES)[0]
    )


def test_a_channel_layers_channel_is_drawn_as_bars() -> None:
    layer = _layer(ChannelNonLocal, scale=0.01)
    figure = similarity(layer, FEATURES, _photograph(), channel=2)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, layer.similarity(FEATURES)[0, 2], rtol=1e-6)
    marked = {int(text.get_text()) for text in figure.axes[0].texts}
    assert marked == set(np.argsort(heights)[-3:].tolist())


def test_a_fully_attentional_layers_channel_is_drawn_in_every_column_and_row() -> None:
    layer = _layer(FullyAttentional)
    figure = similarity(layer, FEATURES, _photograph(), channel=2)
    columns, rows = (each.detach().numpy() for each in layer.similarity(FEATURES))
    np.testing.assert_array_equal(_shown(figure, "channel 2 in each column"), columns[0, :, 2].T)
    np.testing.assert_array_equal(_shown(figure, "channel 2 in each row"), rows[0, :, 2])


@pytest.mark.parametrize(
    "weights",
    [torch.full((3, 4), 0.25), torch.zeros(3, 4), torch.eye(3, 4), torch.rand(3, 4) - 0.5],
    ids=["uniform", "zero", "one-hot", "signed"],
)
def test_any_weights_can_be_written(weights: Tensor, tmp_path: Path) -> None:
    made = (
        figures.draw_channels(weights, torch.randn(4, 5, 6)),
        figures.draw_positions(_photograph(), weights, (0, 0)),
        figures.draw_channel(weights[0], 0),
        figures.draw_profiles(_photograph(), {"column": weights, "row": weights}, 0),
    )
    for number, figure in enumerate(made):
        figure.savefig(tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert len(picture.convert("L").getcolors()) > 10


def test_the_colour_scale_is_linear_logarithmic_or_symmetric() -> None:
    norms = [
        figures.weight_norm(torch.tensor(each)) for each in ([0.2, 0.3], [1e-9, 0.5], [-0.2, 0.1])
    ]
    assert [type(norm).__name__ for norm in norms] == ["Normalize", "LogNorm", "CenteredNorm"]
    limits = [(norm.vmin, norm.vmax) for norm in norms]
    assert limits == [pytest.approx(pair) for pair in ((0, 0.3), (0.5e-4, 0.5), (-0.2, 0.2))]


def test_a_fully_attentional_layer_is_compared_with_the_channel_layer() -> None:
    layer, other = _layer(FullyAttentional, scale=None), ChannelNonLocal(6, scale=0.02)
    (columns, rows) = (each[0].detach() for each in layer.similarity(FEATURES))
    for beside, single in (
        (None, ChannelNonLocal(6, scale=None).similarity(FEATURES)[0].detach()),
        (other, other.similarity(FEATURES)[0].detach()),
    ):
        figure = similarity(layer, FEATURES, _photograph(), point=POINT, beside=beside)
        shown = _shown(figure, "the channel layer's only map")
        np.testing.assert_allclose(shown, single, rtol=1e-6)
        less = _shown(figure, f"column {COLUMN} less that map")
        np.testing.assert_allclose(less, columns[COLUMN] - single, atol=1e-7)
        less = _shown(figure, f"row {ROW} less that map")
        np.testing.assert_allclose(less, rows[ROW] - single, atol=1e-7)
        bars = figure.axes[0].child_axes
        heights = [bar.get_height() for bar in bars[0].patches[: len(columns)]]
        expected = [(each - single).abs().sum(1).mean().item() / 2 for each in columns]
        np.testing.assert_allclose(heights, expected, rtol=1e-5)
        widths = [bar.get_width() for bar in bars[1].patches[: len(rows)]]
        expected = [(each - single).abs().sum(1).mean().item() / 2 for each in rows]
        np.testing.assert_allclose(widths, expected, rtol=1e-5)


def test_distances_are_0_for_equal_and_1_for_disjoint_maps() -> None:
    one, other = torch.eye(4), torch.eye(4).roll(1, 0)
    np.testing.assert_allclose(figures.distances(torch.stack([one, other]), one), [0, 1])


def test_the_pairs_of_channels_with_the_largest_weights_are_shown() -> None:
    weights = torch.full((5, 5), 0.01)
    weights[1, 3], weights[4, 0], weights[2, 2] = 0.5, 0.4, 0.9  # the last with itself
    features = torch.randn(5, 6, 7)
    figure = figures.draw_channels(weights, features)
    panels = [axes for axes in figure.axes if axes.images and axes.get_ylabel().isdigit()]
    assert [int(panel.get_ylabel()) for panel in panels[:4]] == [1, 3, 4, 0]
    for panel in panels:
        shown = np.asarray(panel.images[0].get_array())
        np.testing.assert_array_equal(shown, features[int(panel.get_ylabel())])
    assert panels[0].texts[0].get_text() == "0.5 →"


@pytest.mark.parametrize("kind", ["tensor", "array", "Pillow", "grey Pillow"])
def test_a_photograph_may_be_a_tensor_an_array_or_a_pillow_image(kind: str) -> None:
    photograph = _photograph()
    array = photograph.permute(1, 2, 0).numpy()
    given: Any = {
        "tensor": photograph,
        "array": array,
        "Pillow": Image.fromarray(array),
        "grey Pillow": Image.fromarray(array).convert("L"),
    }[kind]
    figure = similarity(_layer(SpatialNonLocal), FEATURES, given, point=POINT)
    shown = _shown(figure, "the point")
    expected = array if "grey" not in kind else np.repeat(np.asarray(given)[..., None], 3, 2)
    np.testing.assert_array_equal(shown, expected)


def test_without_a_photograph_norms_are_shown_and_points_are_positions() -> None:
    figure = similarity(_layer(FullyAttentional), FEATURES[0], point=(6, 4))
    assert {"map of column 6", "map of row 4"} <= {
        panel.get_title(loc="left") for panel in figure.axes
    }
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (5, 7, 3)
    strength = FEATURES[0].norm(dim=0)
    np.testing.assert_allclose(shown[..., 0], (strength / strength.max() * 255).round())
    with pytest.raises(ValueError, match="the 7x5 photograph"):
        similarity(_layer(FullyAttentional), FEATURES[0], point=(7, 0))


def test_the_default_point_is_the_centre() -> None:
    figure = similarity(_layer(FullyAttentional), FEATURES, _photograph())
    assert {"map of column 3", "map of row 2"} <= {
        panel.get_title(loc="left") for panel in figure.axes
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [FullyAttentional, ChannelNonLocal, SpatialNonLocal])
def test_layers_of_any_dtype_are_drawn(
    kind: type[nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    layer = _layer(kind, dtype=dtype)
    x = FEATURES.to(dtype)
    similarity(layer, x, _photograph()).savefig(tmp_path / "a.png")
    assert "<canvas" in page({"a": (layer, x)}, _photograph())


def test_drawing_does_not_change_the_layer_or_its_gradients() -> None:
    layer = _layer(FullyAttentional).train()
    x = FEATURES.clone().requires_grad_()
    similarity(layer, x, _photograph())
    page({"a": (layer, x)}, _photograph())
    assert layer.training
    assert x.grad is None
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_large_spatial_map_is_drawn_at_a_point_without_being_built() -> None:
    features = torch.zeros(1, 6, 200, 200)  # whose map would take 6 GiB
    figure = similarity(_layer(SpatialNonLocal), features, point=(0, 0))
    np.testing.assert_allclose(_shown(figure, "where it looks"), 1 / 40_000)


@pytest.mark.parametrize(
    ("layer", "given", "error", "said"),
    [
        (_layer(ChannelNonLocal), {"point": (1, 1), "channel": 1}, ValueError, "got both"),
        (_layer(ChannelNonLocal), {"channel": 6}, ValueError, "a channel from 0 to 5, got 6"),
        (_layer(ChannelNonLocal), {"channel": -1}, ValueError, "a channel from 0 to 5, got -1"),
        (_layer(ChannelNonLocal), {"point": (40, 0)}, ValueError, "40x24 photograph, .* got 40,0"),
        (_layer(FullyAttentional), {"point": (0, 24)}, ValueError, "y from 0 to 23, got 0,24"),
        (_layer(SpatialNonLocal), {"channel": 1}, ValueError, "positions and none of channels"),
        (nn.ReLU(), {"point": (1, 1)}, TypeError, "ReLU has no similarity maps; expected a Fully"),
        (nn.Sequential(nn.ReLU(), ChannelNonLocal(6)), {}, TypeError, "inside it .* are '1': draw"),
        (
            _layer(ChannelNonLocal),
            {"x": FEATURES.expand(2, 6, 5, 7)},
            ValueError,
            "one feature map",
        ),
        (_layer(ChannelNonLocal), {"x": None}, TypeError, "a feature map .*, got NoneType"),
        (_layer(FullyAttentional), {"x": FEATURES[:, :5]}, ValueError, "expected 6 channels"),
        (
            _layer(ChannelNonLocal),
            {"photograph": torch.zeros(3, 4, 5)},
            TypeError,
            r"a uint8 photograph, .* got torch.float32 \(3, 4, 5\)",
        ),
    ],
)
def test_invalid_arguments_are_errors_of_one_line(
    layer: nn.Module, given: dict[str, Any], error: type[Exception], said: str
) -> None:
    arguments = {"x": FEATURES, "photograph": _photograph(), **given}
    with pytest.raises(error, match=said) as raised:
        similarity(layer, **arguments)
    assert "\n" not in str(raised.value)


def test_drawing_does_not_change_matplotlibs_settings() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    similarity(_layer(FullyAttentional), FEATURES)
    assert dict(matplotlib.rcParams) == before


# The page


@pytest.fixture(scope="module")
def engine() -> PageScript:
    return PageScript()


_sizes = st.integers(1, 6)


@pytest.mark.parametrize("mode", MODES)
def test_the_page_computes_the_spatial_layers_map(engine: PageScript, mode: str) -> None:
    @given(c=_sizes, h=st.integers(2, 6), w=st.integers(2, 6), step=st.integers(1, 2), seed=_sizes)
    def check(c: int, h: int, w: int, step: int, seed: int) -> None:
        torch.manual_seed(seed)
        layer = SpatialNonLocal(c, mode=mode, subsample=step, scale=None if seed % 2 else 0.7)
        x = torch.randn(c, h, w)
        data = page_data(page({"a": (layer, x)}, _photograph()))
        (described,) = data["layers"]
        (branch,) = described["branches"]
        tokens = position_tokens(data, described, branch)
        assert branch["keyHeight"] * branch["keyWidth"] == (h // step) * (w // step)
        expected = layer.similarity(x).detach().numpy()
        for column, row in {(0, 0), (w - 1, 0), (w - 1, h - 1)}:
            found = engine.call("positionWeights", tokens, [column, row])
            np.testing.assert_allclose(found, expected[row * w + column], rtol=1e-4, atol=1e-6)

    check()


def test_the_page_computes_the_fully_attentional_layers_maps(engine: PageScript) -> None:
    @given(c=_sizes, h=_sizes, w=_sizes, seed=_sizes)
    def check(c: int, h: int, w: int, seed: int) -> None:
        torch.manual_seed(seed)
        layer = FullyAttentional(c, scale=(1.0, None, -0.3)[seed % 3])
        x = torch.randn(1, c, h, w)
        data = page_data(page({"a": (layer, x)}, _photograph()))
        (described,) = data["layers"]
        columns, rows = (each[0].detach().numpy() for each in layer.similarity(x))
        for branch, slices, maps in zip(
            described["branches"], ("column", "row"), (columns, rows), strict=True
        ):
            assert branch["slices"] == slices
            tokens = described | {"query": page_tensor(data, branch["query"]).tolist()}
            key = page_tensor(data, branch["key"]).tolist()
            for index in {0, len(maps) - 1}:
                found = engine.call("sliceMap", tokens, key, slices, index)
                expected = maps[index].ravel()
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        single = page_tensor(data, described["single"]).reshape(c, c)
        expected = ChannelNonLocal(c, scale=layer.scale).similarity(x)[0].detach().numpy()
        np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-7)
        distances = page_tensor(data, described["branches"][0]["distances"])
        expected = np.abs(columns - single).sum(2).mean(1) / 2
        np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-6)

    check()


def test_the_page_holds_the_channel_layers_map() -> None:
    layer = _layer(ChannelNonLocal, least_similar=True)
    data = page_data(page({"a": (layer, FEATURES)}, _photograph()))
    found = page_tensor(data, data["layers"][0]["map"]).reshape(6, 6)
    np.testing.assert_array_equal(found, layer.similarity(FEATURES)[0].detach())


@pytest.mark.parametrize(
    "values", [[0.2, 0.3, 0.25], [1e-9, 0.5, 0.1], [-0.2, 0.1, 0.0], [0.0, 0.0]]
)
def test_the_page_and_the_figures_have_the_same_colour_scales(
    engine: PageScript, values: list[float]
) -> None:
    norm = figures.weight_norm(torch.tensor(values))
    found = engine.call("weightNorm", values)
    assert (found["least"], found["most"]) == pytest.approx((norm.vmin, norm.vmax))
    for value in values:
        expected = float(np.clip(norm(value), 0, 1))
        assert engine.call("place", value, found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("maps", "half", "cut"),
    [
        ([[[0.9, -0.2], [0.1, 0.5]], [[0.0, 0.1], [-0.3, 0.0]]], 0.3, True),
        ([[[0.1, -0.2], [0.1, 0.0]]], 0.2, False),
        ([[[0.4, 0.0], [0.0, 0.0]]], 0.4, False),
        ([[[0.0]]], 1.0, False),
    ],
)
def test_the_colour_scale_of_differences_ignores_the_diagonal(
    engine: PageScript, maps: Any, half: float, cut: bool
) -> None:
    norm, exceeded = figures.difference_norm(torch.tensor(maps))
    assert (norm.vmin, norm.vmax) == pytest.approx((-half, half))
    assert exceeded == cut
    found = engine.call("differenceNorm", np.ravel(maps).tolist(), len(maps[0]))
    assert (found["least"], found["most"]) == pytest.approx((-half, half))
    assert found["cut"] == cut


def test_the_page_is_self_contained_and_small() -> None:
    text = page({"a": (_layer(FullyAttentional), FEATURES)}, _photograph())
    assert not re.search(r"https?:|src=[\"']?(?!data:)\w|@import|url\(", text)
    assert len(text) < 50_000
    # Layers that compare the features themselves share them.
    shared = {
        "a": (ChannelNonLocal(6), FEATURES),
        "b": (SpatialNonLocal(6, mode="gaussian"), FEATURES),
    }
    assert len(page_data(page(shared, _photograph()))["tensors"]) == 2


def test_text_in_a_page_is_escaped() -> None:
    bad = "</script><script>alert(1)</script>{{data}}"
    text = page({bad: (_layer(ChannelNonLocal), FEATURES)}, _photograph(), title=bad, notes=[bad])
    assert "<script>alert" not in text
    assert page_data(text)["layers"][0]["title"] == bad


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"layers": {}}, ValueError, "at least one layer"),
        ({"layers": {"a": (nn.ReLU(), FEATURES)}}, TypeError, "ReLU has no similarity maps"),
        ({"point": (40, 0)}, ValueError, "inside the 40x24 photograph"),
        ({"point": (90, 0), "size": (48, 80)}, ValueError, "inside the 80x48 photograph"),
    ],
)
def test_invalid_arguments_of_page_are_errors(
    given: dict[str, Any], error: type[Exception], said: str
) -> None:
    layers = {"a": (_layer(ChannelNonLocal), FEATURES)}
    with pytest.raises(error, match=said):
        page(**{"layers": layers, "photograph": _photograph(), **given})


def test_plot_is_imported_lazily() -> None:
    assert fullattn.plot.similarity is similarity
