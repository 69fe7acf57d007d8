"""Half precision: finite where a score passes 65504, and near float64, in and out of autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fullattn.attention import reference
from helpers.cases import (
    FULLY_ATTENTIONAL,
    SOFTMAX_CASES,
    Drawn,
    Run,
    arrays,
    assert_near,
    feature_maps,
    runs,
)

HALF = (torch.float16, torch.bfloat16)
LARGEST_FLOAT16 = 65504.0


def exactly_representable(shape: tuple[int, ...], seed: int) -> Tensor:
    """Multiples of 64 up to 512: their means over 4 or 8 are exact in half precision too.

    The scores are then the same numbers in every dtype that accumulates in float32, however large
    they are, so that a result can be held against float64 without asking what a rounding error of
    the key does to a score of 10⁶.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).double() * 64


def pass_through(layer: Any) -> None:
    """Make every Linear and 1x1 convolution hand on its input unchanged, and gamma 1."""
    for name, parameter in layer.named_parameters():
        if name == "gamma":
            torch.nn.init.ones_(parameter)
        elif parameter.dim() == 1:
            torch.nn.init.zeros_(parameter)
        else:
            channels = parameter.shape[0]
            parameter.data.copy_(torch.eye(channels).view(parameter.shape))


def build_passing_through(run: Run, channels: int, **options: Any) -> Any:
    if run.case is not FULLY_ATTENTIONAL and hasattr(run.build(channels), "inner_channels"):
        options["inner_channels"] = channels
    layer = run.build(channels, **options)
    pass_through(layer)
    return layer


# With the small scale the softmax weighs several tokens; the scores before it are as large.
@runs(torch.float16, torch.bfloat16, torch.float32, torch.float64, cases=SOFTMAX_CASES)
@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0**-18], ids=["one", "negative", "small"])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_beyond_the_largest_float16_stay_finite_and_exact(
    run: Run, scale: float, seed: int
) -> None:
    layer = build_passing_through(run, 5, scale=scale)
    exact = exactly_representable((2, 5, 4, 8), seed)
    x = exact.to(run.device, run.dtype).requires_grad_()
    assert torch.equal(x.detach().double().cpu(), exact)
    assert largest_score(run, x) > LARGEST_FLOAT16

    y = run(layer, x)
    assert y.dtype == run.dtype
    assert_near(y, run.case.expected(layer, x), run.dtype)
    # A direction so small that no sum over the image overflows in float16.
    y.backward(torch.full_like(y, 2.0**-12))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def largest_score(run: Run, x: Tensor) -> float:
    """The largest |S| of a layer that passes its input through, before the scale."""
    (image,) = arrays(x)
    image = torch.from_numpy(image)
    if run.case is FULLY_ATTENTIONAL:
        scores = torch.einsum("bihw,bjh->bwij", image, image.mean(3))
    elif run.case.name.startswith("channel"):
        scores = torch.einsum("bihw,bjhw->bij", image, image)
    else:
        scores = torch.einsum("bcp,bcq->bpq", image.flatten(2), image.flatten(2))
    return scores.abs().max().item()


@runs(*HALF)
@given(drawn=feature_maps(factors=(1.0, 0.1)))
def test_half_precision_is_near_float64_from_the_same_inputs(run: Run, drawn: Drawn) -> None:
    # scale=None keeps the scores at the size of the features, as rounding the key to half
    # precision costs a score its size times the dtype's precision.
    layer = run.build(drawn.channels, **({"scale": None} if run.case.scalable else {}))
    x = drawn.x(run)
    y = run(layer, x)
    assert y.dtype == run.dtype
    exact = Run(run.case, reference.BACKEND, torch.float64, run.device)
    assert_near(y, exact(copy.deepcopy(layer).double(), x.double()), run.dtype)


@runs(*HALF)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_half_precision_are_near_float64(run: Run, seed: int) -> None:
    layer = run.build(8, seed, **({"scale": None} if run.case.scalable else {}))
    generator = torch.Generator().manual_seed(seed)
    x, direction = torch.randn(2, 2, 8, 6, 7, generator=generator).to(run.device, run.dtype)
    x.requires_grad_()
    y = run(layer, x)
    actual = torch.autograd.grad(y, [x, *layer.parameters()], direction)

    layer64, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    exact = Run(run.case, reference.BACKEND, torch.float64, run.device)
    inputs = [x64, *layer64.parameters()]
    expected = torch.autograd.grad(exact(layer64, x64), inputs, direction.double())
    size = 0.1 * max(gradient.abs().max().item() for gradient in expected)
    for given_gradient, gradient in zip(actual, expected, strict=True):
        assert_near(given_gradient, gradient, run.dtype, size=size)


@runs(*HALF)
@pytest.mark.parametrize("input_dtype", ["float32", "half"])
def test_autocast_is_near_float64(run: Run, input_dtype: str) -> None:
    layer = run.build(8, **({"scale": None} if run.case.scalable else {})).float()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 6, 7, generator=generator).to(run.device, run.dtype)
    if input_dtype == "float32":
        x = x.float()
    x.requires_grad_()
    with torch.autocast(run.device, dtype=run.dtype):
        y = run(layer, x)
    y.float().sum().backward()
    exact = Run(run.case, reference.BACKEND, torch.float64, run.device)
    layer64, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    y64 = exact(layer64, x64)
    y64.sum().backward()
    assert_near(y, y64, run.dtype)
    assert_near(x.grad, x64.grad, run.dtype, what="gradient of x")
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@runs(*HALF, cases=SOFTMAX_CASES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-18], ids=["one", "small"])
def test_autocast_stays_finite_and_exact_beyond_the_largest_float16(run: Run, scale: float) -> None:
    layer = build_passing_through(run, 5, scale=scale).float()
    x = exactly_representable((2, 5, 4, 8), seed=3).to(run.device, torch.float32)
    assert largest_score(run, x) > LARGEST_FLOAT16
    with torch.autocast(run.device, dtype=run.dtype):
        y = run(layer, x)
    assert_near(y, run.case.expected(layer, x), run.dtype)


@runs(torch.float64)
def test_autocast_leaves_float64_alone(run: Run) -> None:
    layer = run.build(5)
    x = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.autocast(run.device, dtype=torch.bfloat16):
        y = run.case.layer.forward  # the attention alone: autocast casts convolutions of float64
        y = run(layer, x.to(run.device))
    assert y.dtype == torch.float64
