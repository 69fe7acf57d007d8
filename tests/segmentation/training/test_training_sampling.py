"""Which images a step sees depends on seed and step alone, however the step is divided."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullattn.segmentation.training.sampling import StepSampler, ValidationSampler, random_seed

Keys = list[tuple[int, int]]


@st.composite
def samplers(draw: st.DrawFn) -> dict[str, int]:
    processes, parts = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return {
        "images": draw(st.integers(1, 30)),
        "batch_size": processes * parts * draw(st.integers(1, 4)),
        "steps": draw(st.integers(1, 8)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "processes": processes,
        "parts": parts,
    }


def whole(options: dict[str, int]) -> list[Keys]:
    """The batches of one process that takes every step at once."""
    return list(StepSampler(**{**options, "processes": 1, "parts": 1}))


@given(options=samplers())
def test_every_epoch_is_a_permutation(options: dict[str, int]) -> None:
    keys = [key for batch in whole(options) for key in batch]
    images = options["images"]
    for epoch in range(len(keys) // images):
        seen = keys[epoch * images : (epoch + 1) * images]
        assert sorted(seen) == [(epoch, index) for index in range(images)]


@given(options=samplers())
def test_processes_and_parts_share_the_same_step(options: dict[str, int]) -> None:
    shares = [list(StepSampler(**options, process=p)) for p in range(options["processes"])]
    parts = options["parts"]
    for step, expected in enumerate(whole(options)):
        found = [
            key
            for part in range(step * parts, (step + 1) * parts)
            for share in shares
            for key in share[part]
        ]
        assert found == expected


@given(options=samplers(), start=st.integers(0, 8))
def test_a_resumed_run_sees_what_is_left(options: dict[str, int], start: int) -> None:
    left = list(StepSampler(**options, start=start))
    assert left == list(StepSampler(**options))[start * options["parts"] :]


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = list(StepSampler(50, 50, epoch + 1, seed=seed))
        return [index for _, index in batches[epoch]]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(each) for each in orders}) == 9
    assert order(0, 0) != list(range(50))


def test_seeds_of_neighbours_have_nothing_in_common() -> None:
    seeds = [random_seed(seed, step) for seed in range(20) for step in range(20)]
    assert len(set(seeds)) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert random_seed(1, 23) != random_seed(12, 3)
    ones = Counter(seed >> bit & 1 for seed in seeds for bit in range(63))
    assert abs(ones[1] / ones.total() - 0.5) < 0.02


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch of 6 images .* 2 processes with 2 accumulated"):
        StepSampler(9, 6, 1, processes=2, parts=2)
    with pytest.raises(ValueError, match="at least one image"):
        StepSampler(0, 6, 1)


@given(images=st.integers(1, 20), processes=st.integers(1, 6))
def test_every_image_is_evaluated_once(images: int, processes: int) -> None:
    samplers = [ValidationSampler(images, process, processes) for process in range(processes)]
    assert len({len(list(sampler)) for sampler in samplers}) == 1
    counted = [
        index for sampler in samplers for i, index in enumerate(sampler) if sampler.counts(i)
    ]
    assert sorted(counted) == list(range(images))
