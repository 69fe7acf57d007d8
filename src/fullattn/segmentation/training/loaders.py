"""The images of every step and of the evaluations, loaded by worker processes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from fullattn.segmentation.data import DataError, Examples, Normalize, SegmentationDataset, collate
from fullattn.segmentation.training.config import Config
from fullattn.segmentation.training.prepare import augmentation
from fullattn.segmentation.training.sampling import StepSampler, ValidationSampler

__all__ = ["Loaders"]


class _Messages(Dataset[Any]):
    """Examples, with the message of a DataError in the place of one that cannot be read.

    An error raised in a worker would reach the main process as another one, with the worker's
    traceback in its message.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.examples[key]
        except DataError as error:
            return str(error)


def _collate(items: list[Any]) -> dict[str, Any]:
    errors = [item for item in items if isinstance(item, str)]
    return {"error": errors[0]} if errors else {**collate(items)}


class Loaders(LightningDataModule):
    """The data loaders of one process of a run.

    Args:
        config: of the run.
        train: the data set that is trained on.
        val: the one that is evaluated; None for none.
        skip_bad: whether to leave unreadable files out, rather than to end with an error.
    """

    def __init__(
        self,
        config: Config,
        train: SegmentationDataset,
        val: SegmentationDataset | None,
        *,
        skip_bad: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        data = config.data
        seed = config.training.seed
        self.train = Examples(train, augmentation(data), seed=seed, skip_bad=skip_bad)
        self.images = len(train.samples)
        self.val: Examples | None = None
        self.val_images = 0
        if val is not None:
            normalize = Normalize(mean=data.mean, std=data.std)
            self.val = Examples(val, normalize, seed=seed, skip_bad=skip_bad)
            self.val_images = len(val.samples)

    def sampler(self, *, start: int = 0, process: int = 0, processes: int = 1) -> StepSampler:
        """The batches of one process from a step on."""
        training = self.config.training
        return StepSampler(
            self.images,
            training.batch_size,
            training.steps,
            start=start,
            seed=training.seed,
            process=process,
            processes=processes,
            parts=training.accumulate,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches from the step on at which the trainer stands."""
        assert self.trainer is not None
        sampler = self.sampler(
            start=self.trainer.global_step,
            process=self.trainer.global_rank,
            processes=self.trainer.world_size,
        )
        return self._loader(self.train, batch_sampler=sampler)

    def val_dataloader(self) -> Any:
        """Whole images, one by one, since they may differ in size."""
        if self.val is None:
            return []
        return self._loader(self.val, sampler=self._val_sampler(), batch_size=1)

    def counts(self, i: int) -> bool:
        """Whether the i-th image of this process's evaluation is to be counted."""
        return self._val_sampler().counts(i)

    def _val_sampler(self) -> ValidationSampler:
        assert self.trainer is not None
        return ValidationSampler(self.val_images, self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, examples: Examples, **options: Any) -> DataLoader[Any]:
        assert self.trainer is not None
        workers = self.config.data.workers
        return DataLoader(
            _Messages(examples),
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            **options,
        )
