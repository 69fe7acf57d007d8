"""Examples for training: augmented, the same in whatever order and process they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fullattn.segmentation.data.dataset import SegmentationDataset
from fullattn.segmentation.data.errors import DataError
from fullattn.segmentation.seeding import random_seed

__all__ = ["Batch", "Example", "Examples", "collate"]


class Example(TypedDict):
    """One example."""

    image: Tensor
    mask: Tensor
    name: str
    skipped: list[str]


class Batch(TypedDict):
    """Several examples, stacked."""

    image: Tensor
    mask: Tensor
    name: list[str]
    skipped: list[str]


class Examples(Dataset[Example]):
    """A data set with a transform whose random numbers depend on seed, epoch and index alone.

    So an example is the same in whatever order, worker or process it is made, and after a restart.
    A key is an index or (epoch, index); an index alone is of epoch 0.

    Args:
        dataset: images and masks.
        transform: from image uint8 (3, H, W) and mask uint8 (H, W) to what the network takes, with
            PyTorch's random numbers of the CPU.
        seed: of the random numbers.
        skip_bad: give the next readable sample in place of an unreadable one, whose file is then
            named in "skipped"; otherwise it raises.

    Example:
        >>> from fullattn.segmentation.data import Augment, open_dataset
        >>> dataset = open_dataset("camvid", "path/to/camvid", "train")  # doctest: +SKIP
        >>> Examples(dataset, Augment(crop=(352, 480)))[3, 17]  # doctest: +SKIP
        {'image': ..., 'mask': ..., 'name': '0001TP_007200', 'skipped': []}
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        seed: int = 0,
        skip_bad: bool = False,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Example:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} examples")
        read, image, mask, skipped = self._readable(index)
        with torch.random.fork_rng(devices=[]), _one_thread():
            # Not torch.manual_seed, which would seed the GPUs' generators too.
            torch.default_generator.manual_seed(random_seed(self.seed, epoch, index))
            image, mask = self.transform(image, mask)
        name = self.dataset.samples[read].name
        return {"image": image, "mask": mask, "name": name, "skipped": skipped}

    def _readable(self, index: int) -> tuple[int, Tensor, Tensor, list[str]]:
        skipped: list[str] = []
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                return candidate, *self.dataset.read(candidate), skipped
            except DataError as error:
                if not self.skip_bad:
                    raise
                skipped.append(str(error.paths[0]))
        raise DataError(f"none of {len(self)} samples can be read, among them {skipped[0]}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a loader's worker: sums, and with them colours, depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples to a batch.

    Args:
        examples: of `Examples`.

    Returns:
        "image" (B, 3, H, W), "mask" (B, H, W), the names, and everything that was skipped.

    Raises:
        ValueError: the images differ in size.
    """
    shapes = {tuple(example["image"].shape[1:]) for example in examples}
    if len(shapes) > 1:
        sizes = ", ".join(f"{height}×{width}" for height, width in sorted(shapes))
        raise ValueError(
            f"a batch of images of different sizes (height × width): {sizes}; crop them, or take "
            "batches of one"
        )
    return {
        "image": torch.stack([example["image"] for example in examples]),
        "mask": torch.stack([example["mask"] for example in examples]),
        "name": [example["name"] for example in examples],
        "skipped": [path for example in examples for path in example["skipped"]],
    }
