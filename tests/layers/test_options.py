"""Every option of every layer has the effect that it promises, and shows in the repr."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal, functional
from helpers.cases import (
    CASES,
    CHANNEL,
    FULLY_ATTENTIONAL,
    SPATIAL,
    SPATIAL_UNPROJECTED,
    Case,
    assert_near,
)

LAYERS = (FullyAttentional, ChannelNonLocal, SpatialNonLocal)
each_layer = pytest.mark.parametrize("layer_class", LAYERS, ids=lambda layer: layer.__name__)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape or (2, 6, 4, 5), generator=generator, dtype=torch.float64).to(dtype)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.scalable], ids=lambda case: case.name
)
@pytest.mark.parametrize("scale", [1.0, None, 2, -0.5, 0.0])
def test_scale_is_a_factor_on_the_scores_of_either_sign(case: Case, scale: float | None) -> None:
    layer, x = case.build(6, scale=scale), image()
    assert_near(layer(x), case.expected(layer, x), torch.float64)
    if scale != 1.0:
        assert (layer(x) - case.build(6)(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "case", [FULLY_ATTENTIONAL, CHANNEL, SPATIAL_UNPROJECTED], ids=lambda case: case.name
)
def test_gamma_init_is_the_initial_gamma(case: Case) -> None:
    x = image()
    layer = case.build(6, gamma_init=-2.5)
    assert layer.gamma.item() == -2.5
    assert layer.gamma.requires_grad
    attended = case.build(6, gamma_init=1.0)(x) - x
    assert_near(layer(x), x - 2.5 * attended, torch.float64)
    assert case.build(6, gamma_init=0.0).gamma.item() == 0.0


def test_project_is_a_3x3_convolution_normalisation_and_activation_of_the_attention() -> None:
    x = image(dtype=torch.float32)
    torch.manual_seed(0)
    layer = FullyAttentional(6, gamma_init=0.5)
    bare = FullyAttentional(6, gamma_init=0.5, project=False)
    bare.load_state_dict(layer.state_dict(), strict=False)
    convolution = layer.project.conv
    assert (convolution.kernel_size, convolution.bias) == ((3, 3), None)
    assert isinstance(layer.project.norm, nn.BatchNorm2d)
    raw = nn.functional.conv2d(bare(x), convolution.weight, padding=1)
    mean, variance = raw.mean((0, 2, 3), keepdim=True), raw.var((0, 2, 3), False, keepdim=True)
    expected = ((raw - mean) / (variance + 1e-5).sqrt()).clamp_min(0)
    assert_near(layer(x), expected, torch.float32)
    assert bare.project is None


def test_norm_layer_and_act_layer_are_the_projections() -> None:
    x = image(dtype=torch.float32)
    layer = FullyAttentional(6, norm_layer=group_norm, act_layer=nn.Tanh)
    expected = torch.tanh(layer.project.norm(layer.project.conv(x)))  # gamma is 0
    assert isinstance(layer.project.norm, nn.GroupNorm)
    assert_near(layer(x), expected, torch.float32)


def test_a_projection_without_normalisation_has_a_bias_and_may_have_no_activation() -> None:
    x = image(dtype=torch.float32)
    layer = FullyAttentional(6, norm_layer=None, act_layer=None)
    nn.init.constant_(layer.project.conv.bias, -3.0)
    expected = nn.functional.conv2d(x, layer.project.conv.weight, padding=1) - 3.0
    assert (expected < 0).any()
    assert_near(layer(x), expected, torch.float32)


def test_least_similar_attends_to_the_least_similar_channels() -> None:
    x = image(1, 3, 4, 5)
    x[0, 1] = x[0, 0]  # two equal channels and one that is their opposite
    x[0, 2] = -x[0, 0]
    most = ChannelNonLocal(3, dtype=torch.float64).similarity(x)
    least = ChannelNonLocal(3, least_similar=True, dtype=torch.float64).similarity(x)
    assert_near(most[0, 0], torch.tensor([0.5, 0.5, 0.0]), torch.float64)
    assert_near(least[0, 0], torch.tensor([0.0, 0.0, 1.0]), torch.float64)


def test_the_modes_of_the_spatial_layer_differ() -> None:
    x = image()
    outputs = {}
    for mode in ("embedded_gaussian", "gaussian", "dot_product", "concatenation"):
        torch.manual_seed(0)
        layer = SpatialNonLocal(6, mode=mode, zero_init=False, norm_layer=None).double()
        assert layer.mode == mode
        assert (layer.query is None) == (mode == "gaussian")
        assert (layer.score is None) == (mode != "concatenation")
        outputs[mode] = layer(x) - x
    modes = list(outputs)
    for index, mode in enumerate(modes):
        for other in modes[:index]:
            assert (outputs[mode] - outputs[other]).abs().max() > 1e-3, (mode, other)


def test_subsample_pools_key_and_value_and_not_the_query() -> None:
    layer = SPATIAL.build(6, subsample=2)
    assert layer.similarity(image(2, 6, 5, 8)).shape == (2, 40, 8)
    constant = torch.ones(1, 6, 4, 4, dtype=torch.float64)  # pooling does not change it
    unpooled = SPATIAL.build(6)
    assert_near(layer(constant), unpooled(constant), torch.float64)
    assert (layer(image()) - unpooled(image())).abs().max() > 1e-3


def test_inner_channels_are_those_of_query_key_and_value() -> None:
    for given, expected in ((None, 3), (5, 5), (9, 9)):
        layer = SpatialNonLocal(6, inner_channels=given)
        assert layer.query.weight.shape == (expected, 6, 1, 1)
        assert layer.key.weight.shape == (expected, 6, 1, 1)
        assert layer.value.weight.shape == (expected, 6, 1, 1)
        assert layer.output.conv.weight.shape == (6, expected, 1, 1)
    assert SpatialNonLocal(1).inner_channels == 1


def test_norm_layer_of_the_spatial_layer_normalises_its_output() -> None:
    x = image(dtype=torch.float32)
    torch.manual_seed(0)
    layer = SpatialNonLocal(6, norm_layer=group_norm, zero_init=False)
    bare = SpatialNonLocal(6, norm_layer=None, zero_init=False)
    bare.load_state_dict({k: v for k, v in layer.state_dict().items() if "norm" not in k})
    assert_near(layer(x) - x, layer.output.norm(bare(x) - x), torch.float32)
    assert isinstance(SpatialNonLocal(6).output.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, group_norm, None])
def test_zero_init_makes_the_spatial_layer_the_identity(norm_layer: Any) -> None:
    x = image(dtype=torch.float32)
    assert torch.equal(SpatialNonLocal(6, norm_layer=norm_layer)(x), x)
    assert not torch.equal(SpatialNonLocal(6, norm_layer=norm_layer, zero_init=False)(x), x)


def test_without_projection_the_spatial_layer_has_all_channels_as_value_and_a_gamma() -> None:
    x = image()
    layer = SpatialNonLocal(6, inner_channels=2, project=False, dtype=torch.float64)
    assert layer.output is None
    assert layer.query.weight.shape == (2, 6, 1, 1)
    assert layer.value.weight.shape == (6, 6, 1, 1)
    assert layer.gamma.shape == (1,)
    assert torch.equal(layer(x), x)
    nn.init.constant_(layer.gamma, -2.0)
    attended = torch.einsum("bpq,bcq->bcp", layer.similarity(x), layer.value(x).flatten(2))
    assert_near(layer(x), x - 2.0 * attended.view(x.shape), torch.float64)
    assert SpatialNonLocal(6).gamma is None


@each_layer
def test_backend_is_the_one_that_runs(layer_class: Any, ran: list[str]) -> None:
    layer_class(6, backend="sdpa")(image(dtype=torch.float32))
    layer_class(6, backend="reference")(image(dtype=torch.float32))
    assert list(dict.fromkeys(ran)) == ["sdpa", "reference"]


@each_layer
def test_device_and_dtype_are_those_of_every_parameter(layer_class: Any) -> None:
    layer = layer_class(6, device="meta", dtype=torch.bfloat16)
    for name, tensor in layer.state_dict().items():
        assert tensor.device.type == "meta", name
        assert tensor.dtype == torch.bfloat16 or name.endswith("num_batches_tracked"), name
    x = torch.empty(2, 6, 4, 5, device="meta", dtype=torch.bfloat16)
    y = layer(x)
    assert (y.shape, y.device.type, y.dtype) == (x.shape, "meta", torch.bfloat16)


@each_layer
def test_a_layer_made_on_the_meta_device_works_once_it_has_memory(layer_class: Any) -> None:
    layer = layer_class(6, device="meta").to_empty(device="cpu")
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    layer.reset_parameters()
    x = image(dtype=torch.float32)
    assert layer(x).isfinite().all()


@pytest.mark.parametrize(
    ("layer_class", "options"),
    [
        (FullyAttentional, {"gamma_init": 0.25}),
        (ChannelNonLocal, {"gamma_init": 0.25}),
        (SpatialNonLocal, {}),
        (SpatialNonLocal, {"zero_init": False}),
        (SpatialNonLocal, {"mode": "concatenation", "norm_layer": None}),
        (SpatialNonLocal, {"project": False, "gamma_init": 0.25}),
    ],
)
def test_reset_parameters_is_as_good_as_new(layer_class: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    new = layer_class(6, **options).state_dict()
    torch.manual_seed(3)
    layer = layer_class(6, **options)
    layer(image(8, 6, 4, 5, dtype=torch.float32) + 5)  # moves the running statistics
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(9.0)
    torch.manual_seed(4)
    layer.reset_parameters()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, new[name]), name


@each_case
def test_state_dict_round_trip(case: Case) -> None:
    layer, other = case.build(6, seed=1), case.build(6, seed=2, **_moved(case))
    x = image()
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def _moved(case: Case) -> dict[str, float]:
    return {"gamma_init": 0.1} if "gamma_init" in case.options else {}


@each_case
def test_pickle_and_deepcopy_keep_everything(case: Case) -> None:
    layer, x = case.build(6), image()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)


@pytest.mark.parametrize(
    ("layer", "shown"),
    [
        (FullyAttentional(8), "8"),
        (FullyAttentional(8, scale=None), "8, scale=None"),
        (FullyAttentional(8, gamma_init=0.5, project=False), "8, gamma_init=0.5, project=False"),
        (FullyAttentional(8, backend="sdpa"), "8, backend='sdpa'"),
        (ChannelNonLocal(8), "8"),
        (
            ChannelNonLocal(8, scale=-2, least_similar=True, gamma_init=1, backend="chunked"),
            "8, scale=-2.0, least_similar=True, gamma_init=1.0, backend='chunked'",
        ),
        (SpatialNonLocal(8), "8"),
        (SpatialNonLocal(8, inner_channels=4), "8"),
        (
            SpatialNonLocal(8, inner_channels=3, mode="gaussian", subsample=2, zero_init=False),
            "8, inner_channels=3, mode='gaussian', subsample=2, zero_init=False",
        ),
        (SpatialNonLocal(8, scale=0.5, backend="chunked"), "8, scale=0.5, backend='chunked'"),
        (
            SpatialNonLocal(8, inner_channels=1, project=False, gamma_init=0.5),
            "8, inner_channels=1, project=False, gamma_init=0.5",
        ),
    ],
)
def test_extra_repr_shows_what_differs_from_the_default(layer: nn.Module, shown: str) -> None:
    assert layer.extra_repr() == shown
    assert shown in repr(layer)


def test_parameter_names_are_these() -> None:
    # They are in every checkpoint; a new name is a breaking change.
    assert list(dict(FullyAttentional(4).named_parameters())) == [
        "gamma",
        "column_key.weight",
        "column_key.bias",
        "row_key.weight",
        "row_key.bias",
        "project.conv.weight",
        "project.norm.weight",
        "project.norm.bias",
    ]
    assert list(dict(ChannelNonLocal(4).named_parameters())) == ["gamma"]
    assert list(dict(SpatialNonLocal(4, mode="concatenation").named_parameters())) == [
        *(f"{name}.{part}" for name in ("query", "key", "value") for part in ("weight", "bias")),
        "score.weight",
        *(f"output.{name}.{part}" for name in ("conv", "norm") for part in ("weight", "bias")),
    ]
    assert list(dict(SpatialNonLocal(4, project=False).named_parameters())) == [
        "gamma",
        *(f"{name}.{part}" for name in ("query", "key", "value") for part in ("weight", "bias")),
    ]


# The functions that are public beside the layers: without gamma or output they give the attention.


def test_fully_attentional_function_without_gamma_is_the_attention_alone() -> None:
    layer, x = FULLY_ATTENTIONAL.build(6), image()
    keys = layer.column_key(x.mean(3).mT).mT, layer.row_key(x.mean(2).mT).mT
    attended = functional.fully_attentional(x, *keys)
    assert_near(x + layer.gamma * attended, layer(x), torch.float64)
    assert_near(functional.fully_attentional(x, *keys, layer.gamma), layer(x), torch.float64)
    assert_near(functional.columns_and_rows(x, *keys), attended, torch.float64)


def test_channel_function_without_gamma_is_the_attention_alone() -> None:
    layer, x = CHANNEL.build(6), image()
    attended = functional.channel_non_local(x)
    assert_near(x + layer.gamma * attended, layer(x), torch.float64)


def test_spatial_function_without_output_is_the_attention_alone() -> None:
    layer, x = SPATIAL.build(6), image()
    attended = functional.spatial_non_local(layer.query(x), layer.key(x), layer.value(x))
    assert_near(x + layer.output(attended), layer(x), torch.float64)


def test_spatial_function_with_gamma_in_place_of_an_output_is_the_layer_without_projection() -> (
    None
):
    layer, x = SPATIAL_UNPROJECTED.build(6), image()
    query, key, value = layer.query(x), layer.key(x), layer.value(x)
    whole = functional.spatial_non_local(query, key, value, x, layer.gamma)
    assert_near(whole, layer(x), torch.float64)


def test_positions_may_attend_to_another_image_of_another_size() -> None:
    query, key, value = image(2, 3, 4, 5), image(2, 3, 2, 7), image(2, 6, 2, 7)
    similarity = functional.position_similarity(query, key)
    attended = functional.spatial_non_local(query, key, value)
    assert similarity.shape == (2, 20, 14)
    expected = torch.einsum("bpq,bcq->bcp", similarity, value.flatten(2)).view(2, 6, 4, 5)
    assert_near(attended, expected, torch.float64)
