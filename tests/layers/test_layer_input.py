"""Bad input: one clear error, naming what was expected and what came."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal

LAYERS = (FullyAttentional, ChannelNonLocal, SpatialNonLocal)
each_layer = pytest.mark.parametrize("layer_class", LAYERS, ids=lambda layer: layer.__name__)
each_call = pytest.mark.parametrize("call", ["forward", "similarity"])


@each_layer
@each_call
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), r"shape \(B, 4, H, W\) or \(4, H, W\), got 0 axes: \(\)"),
        ((4, 5), r"shape \(B, 4, H, W\) or \(4, H, W\), got 2 axes: \(4, 5\)"),
        ((1, 2, 4, 5, 6), r"got 5 axes: \(1, 2, 4, 5, 6\)"),
        ((2, 3, 5, 6), r"expected 4 channels in axis 1, got 3: shape \(2, 3, 5, 6\)"),
        ((5, 4, 6), r"expected 4 channels in axis 0, got 5: shape \(5, 4, 6\)"),
        ((2, 4, 0, 6), r"H and W of at least 1, got shape \(2, 4, 0, 6\)"),
        ((2, 4, 6, 0), r"H and W of at least 1, got shape \(2, 4, 6, 0\)"),
        ((4, 0, 6), r"H and W of at least 1, got shape \(4, 0, 6\)"),
    ],
)
def test_a_wrong_shape_is_a_value_error(
    layer_class: Any, call: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(layer_class(4), call)(torch.zeros(shape))


@each_layer
@each_call
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=lambda dtype: str(dtype)
)
def test_a_dtype_that_is_not_real_floating_point_is_a_type_error(
    layer_class: Any, call: str, dtype: torch.dtype
) -> None:
    with pytest.raises(TypeError, match=f"real floating-point dtype, got {dtype}"):
        getattr(layer_class(4), call)(torch.zeros(2, 4, 5, 6, dtype=dtype))


@each_layer
@each_call
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_dtype_than_the_layers_is_a_type_error(
    layer_class: Any, call: str, dtype: torch.dtype
) -> None:
    with pytest.raises(TypeError, match=f"the layer's dtype torch.float32, got {dtype}"):
        getattr(layer_class(4), call)(torch.zeros(2, 4, 5, 6, dtype=dtype))


@each_layer
@each_call
def test_another_device_than_the_layers_is_a_value_error(layer_class: Any, call: str) -> None:
    with pytest.raises(ValueError, match="on the layer's device cpu, got meta"):
        getattr(layer_class(4), call)(torch.zeros(2, 4, 5, 6, device="meta"))
    with pytest.raises(ValueError, match="on the layer's device meta, got cpu"):
        getattr(layer_class(4, device="meta"), call)(torch.zeros(2, 4, 5, 6))


@each_layer
@each_call
@pytest.mark.parametrize("value", [None, 3.0, np.zeros((2, 4, 5, 6), np.float32), [[[1.0]]]])
def test_what_is_not_a_tensor_is_a_type_error(layer_class: Any, call: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"a tensor of shape .* got {type(value).__name__}"):
        getattr(layer_class(4), call)(value)


@each_call
def test_a_map_smaller_than_the_pooling_is_a_value_error(call: str) -> None:
    layer = SpatialNonLocal(4, subsample=3)
    with pytest.raises(ValueError, match=r"H and W of at least 3, got shape \(1, 4, 2, 7\)"):
        getattr(layer, call)(torch.zeros(1, 4, 2, 7))


BAD_NUMBERS = [("1", TypeError), (True, TypeError), (1j, TypeError), (None, TypeError)]
NOT_FINITE = [(float("nan"), ValueError), (float("inf"), ValueError), (-float("inf"), ValueError)]
BAD_COUNTS = [
    (0, ValueError),
    (-3, ValueError),
    (4.0, TypeError),
    (True, TypeError),
    ("4", TypeError),
]
BAD_FLAGS = ["yes", None, 2, torch.ones(2)]


def option_id(value: object) -> str | None:
    return getattr(value, "__name__", None)


@each_layer
@pytest.mark.parametrize(("value", "error"), [*BAD_COUNTS, (None, TypeError)], ids=option_id)
def test_bad_channels(layer_class: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="channels must be a positive integer, got"):
        layer_class(value)


@pytest.mark.parametrize("name", ["inner_channels", "subsample"])
@pytest.mark.parametrize(("value", "error"), BAD_COUNTS, ids=option_id)
def test_bad_counts(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name} must be a positive integer, got"):
        SpatialNonLocal(8, **{name: value})


@each_layer
@pytest.mark.parametrize(("value", "error"), [*BAD_NUMBERS[:3], *NOT_FINITE], ids=option_id)
def test_bad_scale(layer_class: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"scale must be .*, got"):
        layer_class(8, scale=value)


@each_layer
@pytest.mark.parametrize(("value", "error"), [*BAD_NUMBERS, *NOT_FINITE], ids=option_id)
def test_bad_gamma_init(layer_class: Any, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"gamma_init must be .*, got"):
        layer_class(8, gamma_init=value)


def test_gamma_init_of_a_layer_without_gamma_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"gamma_init=0\.5 is for project=False, got project=True"):
        SpatialNonLocal(8, gamma_init=0.5)


@each_layer
@pytest.mark.parametrize("value", ["fastest", "", 3, ["sdpa"], "Reference"])
def test_bad_backend(layer_class: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*reference, got"):
        layer_class(8, backend=value)


@pytest.mark.parametrize("value", ["dot", None, 1, ["gaussian"]])
def test_bad_mode(value: Any) -> None:
    with pytest.raises(ValueError, match="mode must be one of 'embedded_gaussian', 'gaussian'"):
        SpatialNonLocal(8, mode=value)


@pytest.mark.parametrize(
    ("layer_class", "name"),
    [
        (FullyAttentional, "project"),
        (ChannelNonLocal, "least_similar"),
        (SpatialNonLocal, "zero_init"),
        (SpatialNonLocal, "project"),
        (FullyAttentional, "mix_images"),
    ],
)
@pytest.mark.parametrize("value", ["yes", None, 2, [True]])
def test_bad_flags(layer_class: Any, name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} must be one of False, True, got"):
        layer_class(8, **{name: value})


@pytest.mark.parametrize(
    ("layer_class", "name"),
    [
        (FullyAttentional, "norm_layer"),
        (FullyAttentional, "act_layer"),
        (SpatialNonLocal, "norm_layer"),
    ],
)
@pytest.mark.parametrize("value", [nn.ReLU(), "BatchNorm2d", 3])
def test_bad_module_factories(layer_class: Any, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a module class, a callable or None, got"):
        layer_class(8, **{name: value})


@each_layer
@pytest.mark.parametrize("name", ["bias", "gama_init", "kernel_size"])
def test_an_unknown_keyword_is_a_type_error(layer_class: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        layer_class(8, **{name: 1})


@each_layer
def test_options_are_keyword_only(layer_class: Any) -> None:
    with pytest.raises(TypeError, match="positional argument"):
        layer_class(8, 1.0)


@each_layer
def test_a_state_dict_of_another_size_is_refused(layer_class: Any) -> None:
    layer = layer_class(8)
    wrong = OrderedDict((name, torch.zeros(99)) for name in layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(wrong)
