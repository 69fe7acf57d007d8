"""Augmentation and examples: image and mask stay aligned, random numbers depend on the key only."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from fullattn.segmentation.data import (
    Augment,
    DataError,
    Examples,
    Normalize,
    SegmentationDataset,
    collate,
    open_dataset,
)
from helpers import tiny_data
from helpers.networks import load
from helpers.processes import run_program

load("torchvision")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "photometric": False}


def blocks(height: int, width: int, side: int) -> tuple[Tensor, Tensor]:
    """Return an image whose red channel is 20 times the label of its mask."""
    label = torch.randint(0, 10, (-(-height // side), -(-width // side)), dtype=torch.uint8)
    mask = label.repeat_interleave(side, 0).repeat_interleave(side, 1)[:height, :width]
    image = torch.stack([mask * 20, torch.full_like(mask, 200), mask * 10])
    return image, mask.contiguous()


def coordinates(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return an image and mask of coordinates: red is the row, green and mask the column."""
    rows = torch.arange(height, dtype=torch.uint8)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8)[None].expand(height, width)
    return torch.stack([rows, columns, torch.zeros_like(rows)]), columns.contiguous()


def augmented(augment: Augment, image: Tensor, mask: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return augment(image, mask)


# One image and its mask


def test_normalize_is_its_formula() -> None:
    image, mask = coordinates(7, 9)
    normalised, labels = Normalize(mean=MEAN, std=STD)(image, mask)
    expected = (image.double() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    assert torch.allclose(normalised.double(), expected, atol=1e-6)
    assert normalised.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(labels, mask.long())


@given(
    size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    crop=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    scale=st.tuples(st.floats(0.3, 1.0), st.floats(1.0, 2.5)),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    photometric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_image_gives_a_crop_and_every_label_its_own_pixel(
    size: tuple[int, int],
    crop: tuple[int, int],
    scale: tuple[float, float],
    flip: float,
    photometric: bool,
    seed: int,
) -> None:
    augment = Augment(crop, scale, flip, photometric, pad=True)
    image, mask = augmented(augment, *blocks(*size, side=4), seed)
    assert image.shape == (3, *crop)
    assert image.dtype == torch.float32
    assert mask.shape == crop
    assert mask.dtype == torch.int64
    assert image.isfinite().all()
    assert ((mask < 10) | (mask == 255)).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_stay_aligned(seed: int, axis: int) -> None:
    # Stripes: however they are scaled, cut and mirrored, the image is bright where the mask is 1,
    # to the pixel, because bilinear passes one half where the nearest pixel changes.
    stripes = ((torch.arange(72) // 12) % 2).byte()
    mask = (stripes[:, None] if axis == 0 else stripes[None]).expand(72, 72).contiguous()
    augment = Augment((64, 80), **PLAIN, pad=True)
    image, labels = augmented(augment, torch.stack([mask * 255] * 3), mask, seed)
    known = labels != 255
    assert {0, 1} <= set(labels[known].tolist())
    certain = known & ((image[0] - 0.5).abs() > 0.01)  # half way both are right
    assert torch.equal(image[0][certain] > 0.5, labels[certain] == 1)
    assert certain.sum() > 0.9 * known.sum()


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.0, 1.3, 1.9])
def test_scaling_shifts_neither_image_nor_mask(factor: float) -> None:
    image, mask = coordinates(100, 120)
    height, width = round(100 * factor), round(120 * factor)
    augment = Augment((height, width), scale=(factor, factor), flip=0.0, pad=True, **PLAIN)
    image, mask = augment(image, mask)
    # The middle of the new pixel, where it lies in the old image.
    expected = (torch.arange(width) + 0.5) * 120 / width - 0.5
    inner = slice(round(3 * factor) + 2, -round(3 * factor) - 2)  # the filter sees no border there
    assert (image[1, height // 2] * 255 - expected)[inner].abs().max() < 0.55
    assert (mask[height // 2] - expected)[inner].abs().max() < 0.55  # the nearest pixel


def test_a_crop_is_a_window_and_all_windows_occur() -> None:
    image, mask = coordinates(12, 14)
    augment = Augment((10, 11), scale=(1.0, 1.0), flip=0.0, **PLAIN)
    corners = set()
    for seed in range(100):
        cut, labels = augmented(augment, image, mask, seed)
        top, left = round(cut[0, 0, 0].item() * 255), round(cut[1, 0, 0].item() * 255)
        expected = image[:, top : top + 10, left : left + 11]
        assert torch.equal((cut * 255).round().byte(), expected)
        assert torch.equal(labels.byte(), mask[top : top + 10, left : left + 11])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(3) for left in range(4)}


def test_flip_mirrors_image_and_mask_with_its_probability() -> None:
    image, mask = coordinates(10, 12)
    mirrored = 0
    for seed in range(60):
        augment = Augment((10, 12), scale=(1.0, 1.0), flip=0.3, **PLAIN)
        cut, labels = augmented(augment, image, mask, seed)
        is_mirrored = bool(labels[0, 0] == 11)
        mirrored += is_mirrored
        expected = mask.flip(1) if is_mirrored else mask
        assert torch.equal(labels.byte(), expected)
        assert torch.equal((cut[1] * 255).round().byte(), expected)
    assert 8 <= mirrored <= 30


def test_a_small_image_is_placed_at_random_and_padded_with_mean_colour_and_255() -> None:
    image = torch.full((3, 10, 12), 255, dtype=torch.uint8)
    mask = torch.zeros(10, 12, dtype=torch.uint8)
    augment = Augment((12, 15), scale=(1.0, 1.0), photometric=False, mean=MEAN, std=STD, pad=True)
    corners = set()
    for seed in range(100):
        padded, labels = augmented(augment, image, mask, seed)
        inside = labels == 0
        assert inside.sum() == 120
        assert (labels[~inside] == 255).all()
        assert (padded[:, ~inside] == 0).all()  # the mean colour, normalised
        assert (padded[:, inside] > 2).all()
        corners.add(tuple(inside.nonzero()[0].tolist()))
    assert corners == {(top, left) for top in range(3) for left in range(4)}


def test_one_side_may_be_padded_and_the_other_cut() -> None:
    image, mask = coordinates(10, 30)
    augment = Augment((20, 20), scale=(1.0, 1.0), flip=0.0, pad=True, **PLAIN)
    cut, labels = augmented(augment, image, mask, 3)
    assert ((labels != 255).sum(0) == 10).all()
    known = labels != 255
    assert torch.equal((cut[1] * 255).round().long()[known], labels[known])


def test_scales_reach_from_the_smallest_to_the_largest() -> None:
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    mask = torch.zeros(40, 40, dtype=torch.uint8)
    augment = Augment((100, 100), scale=(0.5, 2.0), pad=True, photometric=False)
    sides = [
        (augmented(augment, image, mask, seed)[1] == 0).sum().sqrt().item() for seed in range(60)
    ]
    assert 20 <= min(sides) < 25
    assert 75 < max(sides) <= 80
    assert 44 < sum(sides) / 60 < 56


def test_colours_change_and_labels_do_not() -> None:
    image, mask = blocks(40, 40, side=10)
    augment = Augment((40, 40), scale=(1.0, 1.0), flip=0.0)
    unchanged, _ = Normalize()(image, mask)
    changed = 0
    for seed in range(20):
        recoloured, labels = augmented(augment, image, mask, seed)
        assert torch.equal(labels.byte(), mask)
        changed += not torch.allclose(recoloured, unchanged)
        # What was one colour is one colour.
        assert recoloured[:, mask == mask[0, 0]].std(1).max() < 1e-5
    assert 14 <= changed <= 20
    plain = Augment((40, 40), scale=(1.0, 1.0), flip=0.0, photometric=False)
    assert torch.equal(plain(image, mask)[0], unchanged)


def test_inputs_are_not_modified() -> None:
    image, mask = blocks(40, 50, side=8)
    before = image.clone(), mask.clone()
    for seed in range(10):
        augmented(Augment((32, 32)), image, mask, seed)
        Normalize()(image, mask)
    assert torch.equal(image, before[0])
    assert torch.equal(mask, before[1])


@pytest.mark.parametrize("size", [(31, 40), (40, 31)])
def test_an_image_smaller_than_the_crop_raises_unless_pad_is_set(
    size: tuple[int, int],
) -> None:
    image, mask = blocks(*size, side=8)
    with pytest.raises(ValueError, match=rf"{size[0]}×{size[1]} .* smaller than the crop 32×32"):
        Augment((32, 32))(image, mask)
    assert Augment((32, 32), pad=True)(image, mask)[1].shape == (32, 32)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"crop": (0, 3)}, "expected a positive height and width for crop, got"),
        ({"crop": (3,)}, "crop"),
        ({"crop": (3.5, 3)}, "crop"),
        ({"crop": (3, 3), "scale": (0.0, 1.0)}, "expected scale with 0 < smallest <= largest"),
        ({"crop": (3, 3), "scale": (2.0, 1.0)}, "scale"),
        ({"crop": (3, 3), "flip": 1.5}, "expected a probability for flip"),
        ({"crop": (3, 3), "std": (0.0, 1.0, 1.0)}, "std positive"),
        ({"crop": (3, 3), "mean": (0.5,)}, "three numbers"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Augment(**options)


def test_options_may_be_lists() -> None:
    lists = Augment(crop=[3, 4], scale=[0.5, 2.0], mean=list(MEAN), std=list(STD))  # type: ignore[arg-type]
    assert lists == Augment(crop=(3, 4), mean=MEAN, std=STD)
    assert hash(lists) == hash(Augment(crop=(3, 4)))


# Examples


@pytest.fixture
def dataset(tmp_path: Path) -> SegmentationDataset:
    return open_dataset("camvid", tiny_data.camvid(tmp_path), "train")


def same(a: Any, b: Any) -> bool:
    return (
        torch.equal(a["image"], b["image"])
        and torch.equal(a["mask"], b["mask"])
        and a["name"] == b["name"]
    )


def test_an_example_is_a_function_of_seed_epoch_and_index(dataset: SegmentationDataset) -> None:
    examples = Examples(dataset, Augment((32, 48)), seed=5)
    keys = [(epoch, index) for epoch in range(3) for index in range(len(dataset))]
    first = {key: examples[key] for key in keys}
    torch.manual_seed(99)
    for key in reversed(keys):
        torch.rand(3)
        assert same(Examples(dataset, Augment((32, 48)), seed=5)[key], first[key])
    assert same(examples[4], first[0, 4])
    others = [examples[1, 0], examples[2, 0], Examples(dataset, Augment((32, 48)), seed=6)[0, 0]]
    assert not any(torch.equal(other["image"], first[0, 0]["image"]) for other in others)


def test_neighbouring_keys_share_no_random_numbers(dataset: SegmentationDataset) -> None:
    def drawn(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand(3, 4, 4), mask

    numbers = torch.stack(
        [
            Examples(dataset, drawn, seed)[epoch, index]["image"].flatten()
            for seed in range(4)
            for epoch in range(4)
            for index in range(6)
        ]
    )
    assert numbers.unique().numel() == numbers.numel()
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.7


def test_examples_do_not_change_the_global_random_state(
    dataset: SegmentationDataset,
) -> None:
    examples = Examples(dataset, Augment((32, 48)))
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    examples[1, 2]
    assert torch.equal(torch.rand(4), expected)


def test_examples_are_made_by_one_thread_as_workers_do(dataset: SegmentationDataset) -> None:
    """The mean of a large crop, which contrast uses, depends on the number of threads."""
    threads = []

    def noting(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        threads.append(torch.get_num_threads())
        return image, mask

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Examples(dataset, noting)[0]
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


class Keys:
    """Keys of two epochs in an arbitrary order."""

    def __iter__(self) -> Any:
        return iter([(1, 4), (0, 2), (1, 0), (0, 5), (0, 4), (1, 1), (1, 3)])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_examples(workers: int, dataset: SegmentationDataset) -> None:
    examples = Examples(dataset, Augment((32, 48)), seed=3)
    loader = DataLoader(
        examples, batch_size=3, sampler=Keys(), num_workers=workers, collate_fn=collate
    )
    keys = list(Keys())
    for batch in loader:
        expected = collate([examples[keys.pop(0)] for _ in range(len(batch["name"]))])
        assert same(batch, expected)
    assert not keys


@pytest.mark.slow
def test_spawned_workers_make_the_same_examples(
    dataset: SegmentationDataset,
) -> None:
    examples = Examples(dataset, Augment((32, 48)), seed=3)
    examples[0]  # so that there would be something of torchvision to carry over
    loader = DataLoader(
        examples,
        batch_size=2,
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context=multiprocessing.get_context("spawn"),
    )
    assert same(next(iter(loader)), collate([examples[0], examples[1]]))


def test_nothing_of_torchvision_is_in_a_pickled_transform() -> None:
    augment = Augment((8, 8), pad=True)
    augment(*blocks(8, 8, side=4))
    assert b"torchvision" not in pickle.dumps(augment)
    assert pickle.loads(pickle.dumps(augment)) == augment


def test_a_bad_sample_is_replaced_by_the_next_readable_one(
    dataset: SegmentationDataset,
) -> None:
    for index in (1, 2, 5):
        tiny_data.truncate(dataset.samples[index].image)
    examples = Examples(dataset, Augment((32, 48)), skip_bad=True)
    names = [sample.name for sample in dataset.samples]
    skipped = {1: [1, 2], 2: [2], 5: [5]}
    instead = {1: 3, 2: 3, 5: 0}
    for index in range(6):
        example = examples[7, index]
        assert example["name"] == names[instead.get(index, index)]
        assert example["skipped"] == [str(dataset.samples[i].image) for i in skipped.get(index, [])]


def test_a_bad_file_raises_an_error_that_names_it(dataset: SegmentationDataset) -> None:
    bad = dataset.samples[2].mask
    assert bad is not None
    bad.write_bytes(b"")
    examples = Examples(dataset, Augment((32, 48)))
    examples[1]
    with pytest.raises(DataError, match=f"{bad} cannot be read: the file is empty"):
        examples[2]
    for workers in (0, 1):
        loader = DataLoader(examples, batch_size=6, num_workers=workers, collate_fn=collate)
        with pytest.raises(DataError, match=str(bad)):
            next(iter(loader))


def test_skipping_raises_if_every_file_is_bad(dataset: SegmentationDataset) -> None:
    for sample in dataset.samples:
        tiny_data.truncate(sample.image)
    with pytest.raises(DataError, match="none of 6 samples can be read, for example"):
        Examples(dataset, Normalize(), skip_bad=True)[0]


def test_a_batch_stacks_and_lists(dataset: SegmentationDataset) -> None:
    tiny_data.truncate(dataset.samples[1].image)
    examples = Examples(dataset, Normalize(), skip_bad=True)
    batch = collate([examples[0], examples[1], examples[3]])
    assert batch["image"].shape == (3, 3, 48, 64)
    assert batch["mask"].shape == (3, 48, 64)
    names = [sample.name for sample in dataset.samples]
    assert batch["name"] == [names[0], names[2], names[3]]
    assert batch["skipped"] == [str(dataset.samples[1].image)]
    assert torch.equal(batch["mask"][0], dataset.read(0)[1].long())


def test_a_batch_of_different_sizes_raises_and_names_them(tmp_path: Path) -> None:
    root = tiny_data.camvid(tmp_path)
    path = min((root / "images/train").iterdir())
    tiny_data.save(path, np.zeros((20, 30, 3), np.uint8))
    tiny_data.save(root / "labels/train" / f"{path.stem}.png", np.zeros((20, 30), np.uint8))
    examples = Examples(open_dataset("camvid", root, "train"), Normalize())
    with pytest.raises(ValueError, match=r"different sizes \(height × width\): 20×30, 48×64"):
        collate([examples[0], examples[1]])


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_out_of_range_is_an_index_error(index: int, dataset: SegmentationDataset) -> None:
    with pytest.raises(IndexError, match=f"index {index} of 6 examples"):
        Examples(dataset, Normalize())[index]


# What is imported, and what is missing


def test_missing_packages_name_the_extra_and_torchvision_is_imported_on_use() -> None:
    program = """
import sys, torch
sys.modules["PIL"] = None
try:
    import fullattn.segmentation.data
except ImportError as error:
    print(error)
del sys.modules["PIL"]
from fullattn.segmentation.data import Augment, Normalize
image, mask = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
Normalize()(image, mask)
print("torchvision" in sys.modules)
sys.modules["torchvision"] = None
try:
    Augment((4, 4))(image, mask)
except ImportError as error:
    print(error)
"""
    done = run_program(program)
    without_pillow, imported, without_torchvision = done.stdout.splitlines()
    assert "pip install 'fullattn[data]'" in without_pillow
    assert imported == "False"
    assert "torchvision: pip install 'fullattn[data]'" in without_torchvision
