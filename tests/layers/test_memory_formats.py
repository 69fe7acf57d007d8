"""Memory layouts: the same numbers from every layout, nothing modified, the format handed on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fullattn
from helpers.cases import CASES, Case, Drawn, Run, assert_near, feature_maps, runs


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sliced(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    larger = torch.full(
        (batch, channels + 2, 2 * height + 1, 3 * width + 2), float("nan"), dtype=x.dtype
    ).to(x.device)
    view = larger[:, 1 : channels + 1, 1 : 2 * height + 1 : 2, 2 : 3 * width + 2 : 3]
    view.copy_(x)
    return view


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def _expanded_batch(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def _expanded_width(x: Tensor) -> Tensor:
    return x[..., :1].expand(x.shape)


LAYOUTS = (
    _channels_last,
    _sliced,
    _transposed,
    _batch_last,
    _expanded_batch,
    _expanded_width,
)


@runs()
@given(drawn=feature_maps(factors=(1.0, 0.1)), layout=st.sampled_from(LAYOUTS))
def test_every_layout_gives_the_same_numbers_and_gradients(
    run: Run, drawn: Drawn, layout: object
) -> None:
    assert callable(layout)
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = layout(drawn.x(run))
    plain = x.clone(memory_format=torch.contiguous_format)
    direction = drawn.x(run).flip(2)
    results = []
    for given_x in (x, plain):
        leaf = given_x.detach().requires_grad_()
        y = run(layer, leaf)
        results.append((y, *torch.autograd.grad(y, [leaf, *layer.parameters()], direction)))
    size = 0.01 * max(gradient.abs().max().item() for gradient in results[1][1:])
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, run.dtype, size=size)


@runs()
@given(drawn=feature_maps(), layout=st.sampled_from(LAYOUTS))
def test_no_input_is_modified(run: Run, drawn: Drawn, layout: object) -> None:
    assert callable(layout)
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = layout(drawn.x(run))
    copy = x.clone()
    version = x._version
    leaf = x.detach().requires_grad_()
    y = run(layer, leaf)
    direction = torch.ones_like(y)
    y.backward(direction)
    assert torch.equal(x, copy)
    assert x._version == version
    assert (direction == 1).all()


@runs()
@pytest.mark.parametrize("options", [{}, {"projected": True}], ids=["plain", "projected"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_output_has_the_memory_format_of_the_input(
    run: Run, options: dict[str, bool], batch: int
) -> None:
    layer = _projected(run) if options else run.build(4)
    x = torch.randn(batch, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    x = x.to(run.device, run.dtype)
    y = run(layer, x)
    assert y.is_contiguous()
    assert not y.is_contiguous(memory_format=torch.channels_last)
    y = run(layer, _channels_last(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()


def _projected(run: Run) -> torch.nn.Module:
    """The layer with its normalisation, and for FullyAttentional its projection."""
    if run.case.layer is fullattn.FullyAttentional:
        return run.build(4, project=True)
    if run.case.layer is fullattn.SpatialNonLocal:
        return run.build(4, norm_layer=torch.nn.BatchNorm2d)
    return run.build(4)


class _Reversing(torch.nn.Module):
    """A normalisation that hands on the other memory format than it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return _channels_last(x) if x.is_contiguous() else x.contiguous()


@pytest.mark.parametrize("act_layer", [None, torch.nn.ReLU])
def test_the_memory_format_is_kept_whatever_a_norm_layer_does(act_layer: object) -> None:
    layer = fullattn.FullyAttentional(4, norm_layer=lambda _: _Reversing(), act_layer=act_layer)
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert layer(x).is_contiguous()
    assert layer(_channels_last(x)).is_contiguous(memory_format=torch.channels_last)


@runs()
@given(drawn=feature_maps(batches=(1,)))
def test_an_unbatched_input_is_a_batch_of_one(run: Run, drawn: Drawn) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    y = run(layer, x[0])
    assert y.shape == x.shape[1:]
    assert_near(y, run(layer, x)[0], run.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_maps_of_an_unbatched_input_have_no_batch_axis(case: Case) -> None:
    layer = case.build(3)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone, batched = layer.similarity(x), layer.similarity(x[None])
    if isinstance(alone, Tensor):
        alone, batched = [alone], [batched]
    for one, many in zip(alone, batched, strict=True):
        assert torch.equal(one, many[0])


@runs()
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(run: Run, training: bool) -> None:
    layer = run.build(3).train(training)
    x = torch.empty(0, 3, 4, 5, dtype=run.dtype, device=run.device, requires_grad=True)
    y = run(layer, x)
    assert y.shape == (0, 3, 4, 5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_maps_of_an_empty_batch_are_empty(case: Case) -> None:
    maps = case.build(3).similarity(torch.empty(0, 3, 4, 5, dtype=torch.float64))
    for one in [maps] if isinstance(maps, Tensor) else maps:
        assert one.shape[0] == 0
        assert one.dim() == (4 if case.layer is fullattn.FullyAttentional else 3)
