"""Which images a step sees, and which random numbers: functions of (seed, step, process) alone.

Nothing here has a state that a checkpoint would have to hold, so a run continued from any step sees
what an unbroken one does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["StepSampler", "ValidationSampler", "random_seed"]


def random_seed(*numbers: int) -> int:
    """A seed that differs for every sequence of whole numbers.

    Args:
        numbers: whole numbers that need no more than 64 bits.

    Returns:
        A number from 0 to 2⁶³ - 1, the same on every machine.

    Example:
        >>> random_seed(0, 1) == random_seed(0, 1), random_seed(0, 1) == random_seed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one process, from a step on to the last one, as keys (epoch, index).

    All epochs form one sequence, each a permutation from (seed, epoch). A step takes the next
    `batch_size` keys of it, whatever the number of processes and parts: part p of process r has the
    keys from (p · processes + r) · (batch_size / processes / parts) on.

    Args:
        images: in an epoch.
        batch_size: images in a step, over all processes and parts.
        steps: in the whole run.
        start: steps that are already done.
        seed: of the permutations.
        process: number of this one.
        processes: how many there are.
        parts: batches that this process takes its share of a step in.

    Raises:
        ValueError: the batch cannot be divided evenly, or there are no images.

    Example:
        >>> [len(batch) for batch in StepSampler(10, batch_size=8, steps=3)]
        [8, 8, 8]
        >>> list(StepSampler(10, batch_size=8, steps=3, start=2)) == list(
        ...     StepSampler(10, batch_size=8, steps=3)
        ... )[2:]
        True
    """

    images: int
    batch_size: int
    steps: int
    start: int = 0
    seed: int = 0
    process: int = 0
    processes: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError("expected at least one image to train on, got none")
        if self.batch_size % (self.processes * self.parts):
            raise ValueError(
                f"a batch of {self.batch_size} images cannot be divided evenly over "
                f"{self.processes} processes with {self.parts} accumulated parts each"
            )

    @property
    def share(self) -> int:
        """Images in one batch of one process."""
        return self.batch_size // self.processes // self.parts

    def __len__(self) -> int:
        # Of the whole run, as Lightning counts it: a resumed run starts in the midst of it.
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.start, self.steps):
            for part in range(self.parts):
                first = step * self.batch_size
                first += (part * self.processes + self.process) * self.share
                batch = []
                for position in range(first, first + self.share):
                    if position // self.images != epoch:
                        epoch = position // self.images
                        order = self._order(epoch)
                    batch.append((epoch, int(order[position % self.images])))
                yield batch

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(random_seed(self.seed, epoch))
        return torch.randperm(self.images, generator=generator)


@dataclass(frozen=True)
class ValidationSampler(Sampler[int]):
    """Every `processes`-th image from the process's own number on.

    All processes get the same number of images, since those of a sharded network compute together.
    Where the images run out the last one comes again, and `counts` says that it is not to be
    counted.

    Args:
        images: how many there are.
        process: number of this one.
        processes: how many there are.

    Example:
        >>> list(ValidationSampler(5, process=1, processes=2))
        [1, 3, 4]
        >>> [ValidationSampler(5, process=1, processes=2).counts(i) for i in range(3)]
        [True, True, False]
    """

    images: int
    process: int = 0
    processes: int = 1

    def __len__(self) -> int:
        return -(-self.images // self.processes)

    def __iter__(self) -> Iterator[int]:
        for i in range(len(self)):
            yield min(i * self.processes + self.process, self.images - 1)

    def counts(self, i: int) -> bool:
        """Whether the i-th image of this process is one that no other process has had."""
        return i * self.processes + self.process < self.images
