"""Augmented examples for training, independent of the order and process in which they are made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fullattn.segmentation.data.dataset import SegmentationDataset, or_error
from fullattn.segmentation.data.files import DataError
from fullattn.segmentation.seeding import random_seed

__all__ = ["Batch", "Example", "Examples", "collate"]


class Example(TypedDict):
    """An image and its mask, with names."""

    image: Tensor
    mask: Tensor
    name: str
    skipped: list[str]


class Batch(TypedDict):
    """A batch of stacked examples."""

    image: Tensor
    mask: Tensor
    name: list[str]
    skipped: list[str]


@dataclass(eq=False, repr=False)
class Examples(Dataset[Example]):
    """A dataset with a transform whose random numbers depend only on seed, epoch and index.

    An example is therefore the same in any order, worker and process, and after a restart. A key is
    an index or (epoch, index); an index alone means epoch 0.

    Args:
        dataset: images and masks.
        transform: maps image uint8 (3, H, W) and mask uint8 (H, W) to the network's input and
            target, with random numbers of PyTorch's CPU generator.
        seed: seed of the random numbers.
        skip_bad: replace an unreadable sample by the next readable one and name its file in
            "skipped", instead of raising.

    Example:
        >>> from fullattn.segmentation.data import Augment, open_dataset
        >>> dataset = open_dataset("camvid", "path/to/camvid", "train")  # doctest: +SKIP
        >>> Examples(dataset, Augment(crop=(352, 480)))[3, 17]  # doctest: +SKIP
        {'image': ..., 'mask': ..., 'name': '0001TP_007200', 'skipped': []}
    """

    dataset: SegmentationDataset
    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    seed: int = 0
    skip_bad: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Example:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} examples")
        skipped: list[str] = []
        for read in itertools.chain(range(index, len(self)), range(index)):
            found = or_error(self.dataset.read)(read)
            if not isinstance(found, DataError):
                break
            if not self.skip_bad:
                raise found
            skipped.append(str(found.paths[0]))
        else:
            raise DataError(f"none of {len(self)} samples can be read, for example {skipped[0]}")
        # One thread, as loader workers use: sums, and thus colours, depend on their number.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed, which would seed the GPUs' generators too.
                torch.default_generator.manual_seed(random_seed(self.seed, epoch, index))
                image, mask = self.transform(*found)
        finally:
            torch.set_num_threads(threads)
        name = self.dataset.samples[read].name
        return {"image": image, "mask": mask, "name": name, "skipped": skipped}


def collate(examples: Sequence[Example]) -> Batch:
    """Stack items of `Examples`: "image" (B, 3, H, W), "mask" (B, H, W), "name" and "skipped".

    Raises:
        ValueError: the images differ in size.
    """
    shapes = {tuple(example["image"].shape[1:]) for example in examples}
    if len(shapes) > 1:
        sizes = ", ".join(f"{height}×{width}" for height, width in sorted(shapes))
        raise ValueError(
            f"cannot stack images of different sizes (height × width): {sizes}; crop them, or use "
            "batches of one"
        )
    return {
        "image": torch.stack([example["image"] for example in examples]),
        "mask": torch.stack([example["mask"] for example in examples]),
        "name": [example["name"] for example in examples],
        "skipped": [path for example in examples for path in example["skipped"]],
    }
