"""What must not matter: other images, the order of images, of positions, of rows and of columns."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import official_code
from helpers.cases import (
    CHANNEL_CASES,
    FULLY_ATTENTIONAL,
    SPATIAL,
    SPATIAL_CASES,
    Drawn,
    Run,
    assert_near,
    feature_maps,
    runs,
)

UNPOOLED = [case for case in SPATIAL_CASES if "subsample" not in case.options]


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def _permute_positions(x: Tensor, seed: int) -> Tensor:
    flat = x.flatten(2)
    return flat[..., _permutation(flat.shape[-1], seed).to(x.device)].view(x.shape)


@runs()
@given(drawn=feature_maps(batches=(2, 3)), changed=st.integers(0, 2))
def test_changing_one_image_leaves_the_others_alone(run: Run, drawn: Drawn, changed: int) -> None:
    changed %= drawn.batch
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    other = x.clone()
    other[changed] = torch.flip(x[changed], [0, 1, 2]) * 3 + 1
    before, after = run(layer, x), run(layer, other)
    rest = [image for image in range(drawn.batch) if image != changed]
    assert torch.equal(before[rest], after[rest])


@runs()
@given(drawn=feature_maps(batches=(2, 3)), image=st.integers(0, 2))
def test_gradient_of_one_image_for_the_others_is_exactly_zero(
    run: Run, drawn: Drawn, image: int
) -> None:
    image %= drawn.batch
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run).requires_grad_()
    run(layer, x)[image].sum().backward()
    rest = [other for other in range(drawn.batch) if other != image]
    assert not x.grad[rest].any()
    assert x.grad[image].any()


@runs()
@given(drawn=feature_maps(batches=(2, 3)), seed=st.integers(0, 99))
def test_permuting_the_batch_permutes_the_output(run: Run, drawn: Drawn, seed: int) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    order = _permutation(drawn.batch, seed)
    assert_near(run(layer, x[order]), run(layer, x)[order], run.dtype)


@runs()
@given(drawn=feature_maps(batches=(2, 3)))
def test_an_image_alone_gives_what_it_gives_in_a_batch(run: Run, drawn: Drawn) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    together = run(layer, x)
    for image in range(drawn.batch):
        assert_near(run(layer, x[image]), together[image], run.dtype)


@runs(cases=(FULLY_ATTENTIONAL,))
@pytest.mark.parametrize("axis", [2, 3])
@given(drawn=feature_maps(), seed=st.integers(0, 99))
def test_permuting_rows_or_columns_commutes_with_fully_attentional(
    run: Run, axis: int, drawn: Drawn, seed: int
) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    order = _permutation(x.shape[axis], seed).to(x.device)
    permuted = run(layer, x.index_select(axis, order))
    assert_near(permuted, run(layer, x).index_select(axis, order), run.dtype)


@runs(cases=(FULLY_ATTENTIONAL,))
@pytest.mark.parametrize(
    ("axis", "same", "moved"), [(2, "columns", "rows"), (3, "rows", "columns")]
)
@given(drawn=feature_maps(), seed=st.integers(0, 99))
def test_a_columns_map_does_not_see_the_place_in_the_column_nor_a_rows_map_that_in_the_row(
    run: Run, axis: int, same: str, moved: str, drawn: Drawn, seed: int
) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    order = _permutation(x.shape[axis], seed).to(x.device)
    before, after = layer.similarity(x), layer.similarity(x.index_select(axis, order))
    assert_near(getattr(after, same), getattr(before, same), run.dtype)
    assert_near(getattr(after, moved), getattr(before, moved).index_select(1, order), run.dtype)


@runs(cases=(FULLY_ATTENTIONAL,))
@pytest.mark.parametrize("axis", [2, 3])
@given(drawn=feature_maps())
def test_mirroring_commutes_with_fully_attentional(run: Run, axis: int, drawn: Drawn) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    assert_near(run(layer, x.flip(axis)), run(layer, x).flip(axis), run.dtype)


@runs(cases=(FULLY_ATTENTIONAL,))
@given(drawn=feature_maps())
def test_transposing_and_exchanging_the_linears_commutes_with_fully_attentional(
    run: Run, drawn: Drawn
) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    exchanged = copy.deepcopy(layer)
    exchanged.column_key, exchanged.row_key = exchanged.row_key, exchanged.column_key
    x = drawn.x(run)
    assert_near(run(exchanged, x.mT), run(layer, x).mT, run.dtype)


@runs(cases=(FULLY_ATTENTIONAL,))
def test_the_two_linears_are_of_different_axes(run: Run) -> None:
    # Without the exchange the transposed image gives something else, or the test above is empty.
    layer = run.build(5)
    x = torch.randn(2, 5, 4, 7, generator=torch.Generator().manual_seed(0)).to(run.dtype)
    difference = run(layer, x.mT) - run(layer, x).mT
    assert difference.abs().max() > 0.01 * x.abs().max()


@runs(cases=CHANNEL_CASES)
@given(drawn=feature_maps(), seed=st.integers(0, 99))
def test_the_channel_map_does_not_see_where(run: Run, drawn: Drawn, seed: int) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    permuted = _permute_positions(x, seed)
    assert_near(layer.similarity(permuted), layer.similarity(x), run.dtype)
    assert_near(run(layer, permuted), _permute_positions(run(layer, x), seed), run.dtype)


@runs(cases=UNPOOLED)
@given(drawn=feature_maps(), seed=st.integers(0, 99))
def test_permuting_positions_permutes_the_spatial_output(run: Run, drawn: Drawn, seed: int) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    permuted = run(layer, _permute_positions(x, seed))
    assert_near(permuted, _permute_positions(run(layer, x), seed), run.dtype)


@runs(cases=(SPATIAL,))
@given(drawn=feature_maps(), seed=st.integers(0, 99))
def test_permuting_the_inner_channels_does_not_change_the_spatial_map(
    run: Run, drawn: Drawn, seed: int
) -> None:
    layer = run.build(drawn.channels, inner_channels=6, **drawn.options(run.case))
    permuted = copy.deepcopy(layer)
    order = _permutation(6, seed)
    for convolution in (permuted.query, permuted.key):
        convolution.weight.data = convolution.weight.data[order]
        convolution.bias.data = convolution.bias.data[order]
    x = drawn.x(run)
    assert_near(permuted.similarity(x), layer.similarity(x), run.dtype)


def _leak(forward: object, x: Tensor) -> float:
    """How much of the first image's result depends on the second image, by its gradient."""
    x = x.detach().requires_grad_()
    assert callable(forward)
    forward(x)[0].sum().backward()
    assert x.grad is not None
    return x.grad[1].abs().max().item()


@runs(cases=(FULLY_ATTENTIONAL,))
def test_the_official_implementation_mixes_images_and_this_layer_does_not(run: Run) -> None:
    layer = run.build(5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 4, 6, generator=generator).to(run.device, run.dtype)

    def official(x: Tensor) -> Tensor:
        return official_code.fully_attentional(x, layer.column_key, layer.row_key, layer.gamma)

    assert_near(official(x[:1]), run(layer, x[:1]), run.dtype)
    assert (official(x) - run(layer, x)).abs().max() > 0.01
    assert _leak(official, x) > 0.01
    assert _leak(lambda x: run(layer, x), x) == 0.0
