"""Gradients of every backend: against float64, against finite differences, and where they are 0."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.func import functional_call

from fullattn.attention import reference
from helpers.cases import (
    CHANNEL,
    FULLY_ATTENTIONAL,
    SPATIAL,
    Drawn,
    Run,
    assert_near,
    feature_maps,
    runs,
)


def gradients(run: Run, layer: torch.nn.Module, x: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """Gradients of (layer(x) · direction).sum() for x and every parameter."""
    x = x.detach().requires_grad_()
    inputs = {"x": x, **dict(layer.named_parameters())}
    y = run(layer, x)
    # A parameter may have no part in the result: the key's bias under softmax has, exactly 0.
    found = torch.autograd.grad(y, list(inputs.values()), direction)
    return dict(zip(inputs, found, strict=True))


def assert_gradients_near_float64(run: Run, layer: torch.nn.Module, x: Tensor) -> None:
    """Fail unless the run's gradients are those of the reference backend in float64."""
    generator = torch.Generator().manual_seed(9)
    direction = torch.randn(x.shape, generator=generator).to(x)
    exact = Run(run.case, reference.BACKEND, torch.float64, run.device)
    expected = gradients(exact, copy.deepcopy(layer).double(), x.double(), direction.double())
    # A gradient that cancels to nothing (a softmax over one channel) is off by the error of what
    # cancels, which is of the others' size.
    size = 0.01 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, actual in gradients(run, layer, x, direction).items():
        assert actual.dtype == run.dtype
        assert_near(actual, expected[name], run.dtype, size=size, what=f"gradient of {name}")


@runs(torch.float64, torch.float32)
@given(drawn=feature_maps(factors=(1.0, 0.1)))
def test_every_gradient_is_that_of_float64(run: Run, drawn: Drawn) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    assert_gradients_near_float64(run, layer, drawn.x(run))


@runs(torch.float64, torch.float32, cases=(FULLY_ATTENTIONAL, CHANNEL, SPATIAL))
def test_gradients_at_sizes_that_are_cut_into_blocks(run: Run) -> None:
    shapes = {
        FULLY_ATTENTIONAL.name: [(1, 300, 7, 23), (1, 1100, 2, 3), (2, 5, 67, 41)],
        CHANNEL.name: [(2, 1100, 3, 1)],
        SPATIAL.name: [(2, 4, 37, 31)],
    }
    generator = torch.Generator().manual_seed(1)
    for shape in shapes[run.case.name]:
        x = torch.randn(shape, generator=generator).to(run.device, run.dtype)
        assert_gradients_near_float64(run, run.build(shape[1], scale=None), x)


@runs(torch.float64)
@pytest.mark.parametrize("shape", [(2, 3, 2, 4), (1, 2, 5, 3)])
def test_gradcheck(run: Run, shape: tuple[int, ...]) -> None:
    layer = run.build(shape[1])
    parameters = dict(layer.named_parameters())
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(run.device)

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        with run.forced():
            y: Tensor = functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))
        return y

    inputs = [x, *parameters.values()]
    assert torch.autograd.gradcheck(forward, [i.detach().requires_grad_() for i in inputs])


@runs()
def test_second_derivative_is_right_or_a_clear_error(run: Run) -> None:
    layer = run.build(3)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 4, 5, generator=generator).to(run.device, run.dtype)

    def squared_gradient(layer: torch.nn.Module, x: Tensor, run: Run) -> Tensor:
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(run(layer, x).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        return second

    exact = Run(run.case, reference.BACKEND, torch.float64, run.device)
    expected = squared_gradient(copy.deepcopy(layer).double(), x.double(), exact)
    try:
        actual = squared_gradient(layer, x, run)
    except RuntimeError as error:
        # Either outcome is right, as long as the error says what it is about.
        assert re.search("not implemented|differentiated once", str(error))  # noqa: PT017
        return
    assert_near(actual, expected, run.dtype)


def _zero_gradients(layer: torch.nn.Module) -> set[str]:
    return {
        name
        for name, parameter in layer.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }


@runs(cases=(FULLY_ATTENTIONAL,))
def test_gamma_gets_a_gradient_at_the_first_step_and_the_linears_at_the_second(run: Run) -> None:
    layer = run.build(5, gamma_init=0.0)
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(2, 2, 5, 4, 3, generator=generator).to(run.device, run.dtype)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    linears = {"column_key.weight", "column_key.bias", "row_key.weight", "row_key.bias"}
    for without_gradient in (linears, set()):
        optimiser.zero_grad()
        (run(layer, x) - target).pow(2).mean().backward()
        assert _zero_gradients(layer) == without_gradient
        optimiser.step()


@runs(cases=(CHANNEL,))
def test_gamma_of_the_channel_layer_gets_a_gradient_at_the_first_step(run: Run) -> None:
    layer = run.build(5, gamma_init=0.0, scale=None)
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(2, 2, 5, 4, 3, generator=generator).to(run.device, run.dtype)
    (run(layer, x) - target).pow(2).mean().backward()
    assert not _zero_gradients(layer)


@runs(cases=(SPATIAL,))
def test_zero_output_gets_a_gradient_at_the_first_step_and_the_rest_at_the_second(run: Run) -> None:
    layer = run.build(5, zero_init=True)
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(2, 2, 5, 4, 3, generator=generator).to(run.device, run.dtype)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(2):
        optimiser.zero_grad()
        (run(layer, x) - target).pow(2).mean().backward()
        moving = {name for name, _ in layer.named_parameters()} - _zero_gradients(layer)
        if step == 0:
            assert moving == {"output.conv.weight", "output.conv.bias"}
        else:
            assert {"query.weight", "key.weight", "value.weight"} <= moving
        optimiser.step()


@runs()
@pytest.mark.parametrize("seed", [0, 1])
def test_gamma_or_output_of_zero_is_bit_identical_to_the_input(run: Run, seed: int) -> None:
    zero = {"gamma_init": 0} if "gamma_init" in run.case.options else {"zero_init": True}
    layer = run.build(7, seed, **zero)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 7, 5, 3, generator=generator) * 10**seed).to(run.device, run.dtype)
    assert torch.equal(run(layer, x), x)
