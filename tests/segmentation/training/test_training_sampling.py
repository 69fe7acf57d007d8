"""The images of a step depend on seed and step alone, however the step is divided."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler, TensorDataset

from fullattn.segmentation.seeding import random_seed
from fullattn.segmentation.training.sampling import StepSampler, is_repeated

Keys = list[tuple[int, int]]


@st.composite
def samplers(draw: st.DrawFn) -> dict[str, int]:
    world_size, accumulation_steps = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return {
        "images": draw(st.integers(1, 30)),
        "batch_size": world_size * accumulation_steps * draw(st.integers(1, 4)),
        "steps": draw(st.integers(1, 8)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "world_size": world_size,
        "accumulation_steps": accumulation_steps,
    }


def undivided(options: dict[str, int]) -> list[Keys]:
    """Return the batches of a single process without accumulation."""
    return list(StepSampler(**{**options, "world_size": 1, "accumulation_steps": 1}))


@given(options=samplers())
def test_every_epoch_is_a_permutation(options: dict[str, int]) -> None:
    keys = [key for batch in undivided(options) for key in batch]
    images = options["images"]
    for epoch in range(len(keys) // images):
        seen = keys[epoch * images : (epoch + 1) * images]
        assert sorted(seen) == [(epoch, index) for index in range(images)]


@given(options=samplers())
def test_ranks_and_accumulation_steps_divide_the_same_step(options: dict[str, int]) -> None:
    ranks = [list(StepSampler(**options, rank=rank)) for rank in range(options["world_size"])]
    assert {len(batches) for batches in ranks} == {len(StepSampler(**options))}
    accumulated = options["accumulation_steps"]
    steps = undivided(options)
    assert len(steps) == options["steps"]
    for step, expected in enumerate(steps):
        found = [
            key
            for i in range(step * accumulated, (step + 1) * accumulated)
            for batches in ranks
            for key in batches[i]
        ]
        assert found == expected


@given(options=samplers(), start=st.integers(0, 8), rank=st.integers(0, 3))
def test_a_resumed_run_sees_the_remaining_batches(
    options: dict[str, int], start: int, rank: int
) -> None:
    options["rank"] = rank % options["world_size"]
    options["start"] = min(start, options["steps"])
    remaining = list(StepSampler(**options))
    skipped = options["start"] * options["accumulation_steps"]
    assert remaining == list(StepSampler(**{**options, "start": 0}))[skipped:]


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = list(StepSampler(50, 50, epoch + 1, seed=seed))
        return [index for _, index in batches[epoch]]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(each) for each in orders}) == 9
    assert order(0, 0) != list(range(50))


def test_seeds_of_neighbouring_integers_are_unrelated() -> None:
    seeds = [random_seed(seed, step) for seed in range(20) for step in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert random_seed(1, 23) != random_seed(12, 3)
    ones = Counter(seed >> bit & 1 for seed in seeds for bit in range(63))
    assert abs(ones[1] / ones.total() - 0.5) < 0.02


def test_an_uneven_division_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"multiple of .* = 2 · 2, got 6"):
        StepSampler(9, 6, 1, world_size=2, accumulation_steps=2)
    with pytest.raises(ValueError, match="at least one image"):
        StepSampler(0, 6, 1)


@given(images=st.integers(1, 20), world_size=st.integers(1, 6))
def test_every_image_is_evaluated_once(images: int, world_size: int) -> None:
    dataset = TensorDataset(torch.zeros(images))
    samplers = [
        DistributedSampler(dataset, world_size, rank, shuffle=False) for rank in range(world_size)
    ]
    assert len({len(list(sampler)) for sampler in samplers}) == 1
    counted = [
        index
        for sampler in samplers
        for i, index in enumerate(sampler)
        if not is_repeated(sampler, i)
    ]
    assert sorted(counted) == list(range(images))
