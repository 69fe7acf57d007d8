"""Every layer on every backend is the formula of its paper, computed by the NumPy oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given

from fullattn.attention import reference
from fullattn.attention.reference import similarity
from helpers.cases import (
    CASES,
    CHANNEL,
    FULLY_ATTENTIONAL,
    SOFTMAX_CASES,
    SPATIAL,
    Case,
    Drawn,
    Run,
    arrays,
    assert_near,
    feature_maps,
    runs,
)


@runs(torch.float64, torch.float32)
@given(drawn=feature_maps())
def test_layer_equals_the_oracle(run: Run, drawn: Drawn) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    assert_near(run(layer, x), run.case.expected(layer, x), run.dtype)


# Sizes at which a backend that works in blocks has several of them: many slices of which not all
# fit one block, slices too large for one block, and many tokens in one slice.
LARGE = [
    (FULLY_ATTENTIONAL, (1, 300, 7, 23)),
    (FULLY_ATTENTIONAL, (2, 1100, 2, 3)),
    (FULLY_ATTENTIONAL, (2, 5, 67, 41)),
    (CHANNEL, (2, 1100, 3, 1)),
    (SPATIAL, (2, 4, 37, 31)),
]


@runs(torch.float64, torch.float32, cases=(FULLY_ATTENTIONAL, CHANNEL, SPATIAL))
def test_sizes_that_are_cut_into_blocks_equal_the_oracle(run: Run) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in (shape for case, shape in LARGE if case is run.case):
        layer = run.build(shape[1], scale=None)
        x = torch.randn(shape, generator=generator).to(run.device, run.dtype)
        assert_near(run(layer, x), run.case.expected(layer, x), run.dtype, what=str(shape))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@given(drawn=feature_maps())
def test_similarity_maps_equal_the_oracle(case: Case, drawn: Drawn) -> None:
    run = Run(case, reference.BACKEND, torch.float64, "cpu")
    layer = run.build(drawn.channels, **drawn.options(case))
    x = drawn.x(run)
    maps = _maps(layer, x)
    expected = case.maps(layer, *arrays(x))
    assert len(maps) == len(expected)
    for actual, exact in zip(maps, expected, strict=True):
        assert_near(actual, exact, torch.float64, what="map")


@pytest.mark.parametrize("case", SOFTMAX_CASES, ids=lambda case: case.name)
@given(drawn=feature_maps(factors=(1.0, 1e-3, 1e3)))
def test_every_row_of_a_softmax_map_sums_to_one(case: Case, drawn: Drawn) -> None:
    run = Run(case, reference.BACKEND, torch.float64, "cpu")
    layer = run.build(drawn.channels, **drawn.options(case))
    for weights in _maps(layer, drawn.x(run)):
        assert (weights >= 0).all()
        assert_near(weights.sum(-1), torch.ones(weights.shape[:-1]), torch.float64)


@runs()
@given(drawn=feature_maps())
def test_map_times_value_is_the_forward(run: Run, drawn: Drawn) -> None:
    layer = run.build(drawn.channels, **drawn.options(run.case))
    x = drawn.x(run)
    maps = arrays(*_maps(layer, x))
    (image,) = arrays(x)
    attended = torch.from_numpy(run.case.attended(layer, image, maps))
    if layer.gamma is not None:
        added = layer.gamma.item() * attended
    else:
        added = copy.deepcopy(layer.output).double().cpu()(attended)
    assert_near(run(layer, x), x.double().cpu() + added, run.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_half_precision_are_float32_and_sum_to_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 3, 5, 7, generator=generator).to(dtype)
    key = torch.randn(2, 1, 11, 7, generator=generator).to(dtype)
    weights = similarity(query, key, 0.5)
    assert weights.dtype == torch.float32
    assert_near(weights.sum(-1), torch.ones(2, 3, 5), torch.float32)


def _maps(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    maps = layer.similarity(x)
    return [maps] if isinstance(maps, torch.Tensor) else list(maps)
