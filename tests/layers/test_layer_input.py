"""Bad input: one clear error, naming what was expected and what came."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import einops
import numpy as np
import pytest
import torch
from PIL import Image
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


# The input as it came, and the expression of the hint that makes it a feature map (B, 4, 5, 6).
LAYOUTS = {
    "(B, H, W, C)": ("b c h w -> b h w c", "x.permute(0, 3, 1, 2)"),
    "(H, W, C)": ("1 c h w -> h w c", "x.permute(2, 0, 1)"),
    "tokens (B, N, C)": ("b c h w -> b (h w) c", "x.mT.unflatten(2, (H, W))"),
    "tokens (N, C)": ("1 c h w -> (h w) c", "x.mT.unflatten(1, (H, W))"),
    "(B, C, N)": ("b c h w -> b c (h w)", "x.unflatten(2, (H, W))"),
    "(B, C, T, H, W)": ("(b t) c h w -> b c t h w", "x.transpose(1, 2).flatten(0, 1)"),
    "(B, T, C, H, W)": ("(b t) c h w -> b t c h w", "x.flatten(0, 1)"),
}


@each_layer
@each_call
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hint_of_another_layout_makes_a_feature_map_of_it(
    layer_class: Any, call: str, layout: str
) -> None:
    pattern, expression = LAYOUTS[layout]
    batch = 1 if pattern.startswith("1") else 6
    x = torch.randn(batch, 4, 5, 7)
    given = einops.rearrange(x, pattern, **({"t": 3} if "t" in pattern else {}))
    with pytest.raises(ValueError, match=re.escape(f"for {layout} use {expression}")):
        getattr(layer_class(4), call)(given)
    mended = eval(expression, {"x": given, "H": 5, "W": 7})
    assert torch.equal(mended.reshape(x.shape), x)


@each_layer
def test_channels_that_are_on_no_axis_get_no_hint_of_another_layout(layer_class: Any) -> None:
    for shape in ((2, 9, 5, 6), (9, 5, 6), (9, 5), (1, 2, 9, 5, 6)):
        with pytest.raises(ValueError, match=r"\)$"):  # the shape ends the sentence
            layer_class(4)(torch.zeros(shape))


@each_layer
def test_an_image_in_place_of_features_gets_a_hint(layer_class: Any) -> None:
    with pytest.raises(ValueError, match=r"got 3: .*an image needs .*from 3 to 4 channels"):
        layer_class(4)(torch.zeros(2, 3, 5, 6))


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
@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        (torch.uint8, "; use x.float(), for an image x.float() / 255"),
        (torch.int64, "; use x.float()"),
        (torch.bool, "; use x.float()"),
        (torch.complex64, ""),
    ],
    ids=str,
)
def test_the_hint_of_a_dtype_converts_it(layer_class: Any, dtype: torch.dtype, hint: str) -> None:
    with pytest.raises(TypeError, match=f"got {dtype}{re.escape(hint)}$"):
        layer_class(4)(torch.zeros(2, 4, 5, 6, dtype=dtype))


@each_layer
@each_call
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_dtype_than_the_layers_is_a_type_error(
    layer_class: Any, call: str, dtype: torch.dtype
) -> None:
    message = (
        f"the layer's dtype torch.float32, got {dtype}; use x.to(torch.float32), layer.to({dtype}) "
    )
    with pytest.raises(TypeError, match=re.escape(message)):
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


@each_layer
@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (np.zeros((4, 5, 6), np.float32), "; use torch.from_numpy(x)"),
        (
            Image.new("RGB", (6, 5)),
            "; use torch.from_numpy(numpy.array(x)).permute(2, 0, 1) / 255",
        ),
        ([torch.zeros(1, 4, 5, 6)], "; give one of its feature maps, such as x[0]"),
        ({"out": torch.zeros(1, 4, 5, 6)}, "; give one of its feature maps, such as x['out']"),
        ([], ""),
        ([1.0], ""),
        (None, ""),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_the_hint_of_another_type_makes_a_tensor_of_it(
    layer_class: Any, value: Any, hint: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(f"got {type(value).__name__}{hint}") + "$"):
        layer_class(4)(value)
    if hint:
        expression = hint.split(" ", 2)[2] if hint.startswith("; use") else hint.split()[-1]
        assert torch.is_tensor(eval(expression, {"x": value, "torch": torch, "numpy": np}))


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


@each_layer
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.zeros(2, 64, 9, 9), r"a tensor (2, 64, 9, 9)"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), "an instance of Sequential"),
        ([64], "[64]"),
        ((64, 97, 97), "(64, 97, 97)"),
        ("64", "'64'"),
    ],
    ids=option_id,
)
def test_what_came_in_place_of_channels_is_shown_in_one_line(
    layer_class: Any, value: Any, shown: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(f"positive integer, got {shown}") + "$"):
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
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("in_channels", "; did you mean 'channels'?"),
        ("num_channels", "; did you mean 'channels'?"),
        ("dim", "; did you mean 'channels'?"),
        ("in_planes", "; did you mean 'channels'?"),
        ("gama_init", "; did you mean 'gamma_init'?"),
        ("height", "; height and width are free"),
        ("out_channels", "; the output has the channels of the input"),
        ("kernel_size", "; expected channels, "),
    ],
)
def test_an_unknown_keyword_is_a_type_error(layer_class: Any, name: str, hint: str) -> None:
    message = f"{layer_class.__name__} got an unexpected keyword argument {name!r}{hint}"
    with pytest.raises(TypeError, match=re.escape(message)):
        layer_class(**{name: 8})


@each_layer
def test_a_given_argument_is_not_suggested(layer_class: Any) -> None:
    with pytest.raises(TypeError, match="argument 'in_channels'; expected"):
        layer_class(8, in_channels=8)
    with pytest.raises(TypeError, match="argument 'scales'; expected"):
        layer_class(8, scale=1.0, scales=2.0)


@each_layer
def test_options_are_keyword_only(layer_class: Any) -> None:
    with pytest.raises(TypeError, match=r"takes 1 positional argument, channels, got \(8, 1\.0\)"):
        layer_class(8, 1.0)
    with pytest.raises(TypeError, match=r"got \(64, 97, 97\); height and width are free"):
        layer_class(64, 97, 97)


@each_layer
def test_missing_and_repeated_channels_are_pythons_errors(layer_class: Any) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'channels'"):
        layer_class()
    with pytest.raises(TypeError, match="multiple values for argument 'channels'"):
        layer_class(8, channels=8)


def test_a_subclass_has_the_arguments_of_its_own_init() -> None:
    class Wide(FullyAttentional):
        def __init__(self, width: int, height: int, **options: Any) -> None:
            super().__init__(width * height, **options)

    assert Wide(2, 3, project=False).channels == Wide(width=2, height=3).channels == 6
    with pytest.raises(TypeError, match="Wide takes 2 positional arguments, width, height, got"):
        Wide(2, 3, 4)  # type: ignore[call-arg]


@each_layer
def test_a_state_dict_of_another_size_is_refused(layer_class: Any) -> None:
    layer = layer_class(8)
    wrong = OrderedDict((name, torch.zeros(99)) for name in layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(wrong)
