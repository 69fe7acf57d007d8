"""`torch.jit.trace` and `torch.onnx.export(dynamo=False)`, in every form of the layers."""

from __future__ import annotations

import io
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fullattn
from fullattn.attention import native
from helpers.tools import images, near, own_operators

fully = partial(fullattn.FullyAttentional, gamma_init=0.7)
channel = partial(fullattn.ChannelNonLocal, gamma_init=0.7)
FORMS: dict[str, Any] = {
    "fully": fully,
    "fully-scaled": partial(fully, project=False, scale=None),
    "fully-mix_images": partial(fully, project=False, mix_images=True),
    "fully-native": partial(fully, project=False, backend="native"),
    "channel": channel,
    "channel-scaled": partial(channel, scale=None, least_similar=True),
    "channel-chunked": partial(channel, backend="chunked"),
}
for mode in ("embedded_gaussian", "gaussian", "dot_product", "concatenation"):
    for subsample in (1, 2):
        options = {"mode": mode, "subsample": subsample, "scale": None if subsample == 2 else 1.0}
        form = partial(fullattn.SpatialNonLocal, **options)
        FORMS[f"spatial-{mode}-{subsample}"] = partial(form, zero_init=False)
        FORMS[f"danet-{mode}-{subsample}"] = partial(form, project=False, gamma_init=0.7)

UNSEEN = ((1, 16, 5, 7), (3, 16, 20, 11), (5, 16, 33, 8))
if native._unavailable() is not None:
    del FORMS["fully-native"]  # refused by name, traced or not
each_form = pytest.mark.parametrize("form", FORMS)


def built(form: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that images mix
        layer: nn.Module = FORMS[form](16).eval()
    return layer


@each_form
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_is_right_at_sizes_never_seen_without_our_operators(
    form: str, gradients: bool
) -> None:
    layer = built(form)
    with torch.set_grad_enabled(gradients):
        program = torch.jit.trace(layer, images(2, 16, 9, 12))
    assert not own_operators(program)
    for shape in UNSEEN:
        x = images(*shape).requires_grad_()
        near(program(x), layer(x))
        (found,) = torch.autograd.grad(program(x).square().sum(), x)
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        near(found, expected, 1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unbatched_trace_and_one_of_half_precision_are_right() -> None:
    layer = built("fully")
    near(torch.jit.trace(layer, images(16, 9, 12))(images(16, 5, 7)), layer(images(16, 5, 7)))
    layer = layer.bfloat16()
    x = images(2, 16, 9, 12).bfloat16()
    # Its own check compares with 1e-5, half precision or not.
    near(torch.jit.trace(layer, x, check_trace=False)(x).float(), layer(x).float(), 0.02)


@each_form
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_of_a_trace_is_right_at_sizes_never_seen(form: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, file = built(form), io.BytesIO()
    axes = {0: "batch", 2: "height", 3: "width"}
    torch.onnx.export(
        layer,
        (images(2, 16, 9, 12),),
        file,
        dynamo=False,
        opset_version=17,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": axes, "y": axes},
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in UNSEEN:
        x = images(*shape)
        (y,) = session.run(None, {"x": x.numpy()})
        near(torch.from_numpy(y), layer(x).detach(), 1e-4)
