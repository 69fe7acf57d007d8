"""The Lightning module: data, optimizer, loss and evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from fullattn.segmentation.data import (
    IGNORE_INDEX,
    Augment,
    DataError,
    Examples,
    Normalize,
    SegmentationDataset,
    collate,
)
from fullattn.segmentation.data.dataset import ErrorsAsValues
from fullattn.segmentation.evaluation.scores import Scores, confusion_matrix
from fullattn.segmentation.models import FLANet
from fullattn.segmentation.models.files import Description, describe
from fullattn.segmentation.seeding import random_seed
from fullattn.segmentation.training.config import Config, TrainingConfig
from fullattn.segmentation.training.sampling import StepSampler, is_repeated

if TYPE_CHECKING:
    from torchmetrics.classification import MulticlassConfusionMatrix

__all__ = ["NonFiniteError", "Segmentation", "ShardedSegmentation", "learning_rate_factor"]


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is not finite; the message names the step and its images."""


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Compute (1 - step / steps) ** power · min(1, (step + 1) / warmup_steps), step from 0."""
    decay: float = max(0.0, 1 - step / config.steps) ** config.power
    return decay * min(1.0, (step + 1) / max(1, config.warmup_steps))


def _collate(items: list[Any]) -> dict[str, Any]:
    errors = [item for item in items if isinstance(item, DataError)]
    return {"error": errors[0]} if errors else {**collate(items)}


class Segmentation(LightningModule):
    """A network for semantic segmentation, trained by SGD with momentum and a poly schedule.

    The loss of a step is computed over all labelled pixels of the step, in the images of all
    processes and accumulation steps together:

        mean( cross_entropy(main) ) + auxiliary_weight · Σ_aux mean( cross_entropy(aux) )

    It is not a mean of the images' means: an image with few labelled pixels has a small weight.
    Each backward pass yields the gradient of a sum, and before the optimizer's step the gradients
    are divided by the number of labelled pixels of all passes. N processes, or k accumulation
    steps, therefore yield the gradient of one process with the whole batch. Only the statistics of
    batch normalisation differ: they are taken over the batch of one pass of one process, or with
    `sync_batchnorm` of all processes.

    Random numbers in the network (dropout) depend on (seed, step, accumulation step, rank).

    Args:
        model: network with output (B, K, H, W), or in training a list of it and of auxiliary
            outputs. Parameters in its attribute "backbone" have the plain learning rate, all
            others `head_learning_rate` times it.
        config: configuration of the run.
        train: dataset to train on.
        val: dataset to evaluate; None for none.
        skip_bad: whether to skip unreadable files instead of raising a DataError.

    Attributes:
        skipped: unreadable files that this process skipped.
        scores: scores of the last evaluation; None before.
    """

    def __init__(
        self,
        model: FLANet,
        config: Config,
        train: SegmentationDataset,
        val: SegmentationDataset | None = None,
        *,
        skip_bad: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.dataset = train
        data, seed = config.data, config.training.seed
        augment = Augment(**data.model_dump(exclude={"name", "train", "val", "workers"}))
        normalize = Normalize(mean=data.mean, std=data.std)
        self.train_examples: Examples = Examples(train, augment, seed, skip_bad)
        self.val_examples: Examples | None = (
            None if val is None else Examples(val, normalize, seed, skip_bad)
        )
        self.skipped: set[str] = set()
        self.confusion: MulticlassConfusionMatrix = confusion_matrix(
            len(train.classes), IGNORE_INDEX
        )
        self.scores: Scores | None = None
        # Loss and number of labelled pixels of each accumulation step, and all images' names.
        self._sums: list[Tensor] = []
        self._images: list[str] = []

    def train_dataloader(self) -> DataLoader[Any]:
        """Load the batches from the trainer's step on."""
        training = self.config.training
        sampler = StepSampler(
            len(self.train_examples),
            training.batch_size,
            training.steps,
            start=self.global_step,
            seed=training.seed,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            accumulation_steps=training.accumulate,
        )
        return self._loader(self.train_examples, batch_sampler=sampler)

    def val_dataloader(self) -> Any:
        """Load whole images one by one, because their sizes may differ."""
        if self.val_examples is None:
            return []
        # All ranks get the same number of images, for which the sampler repeats some: the
        # processes of a sharded network must run in step.
        self.val_sampler: DistributedSampler[Any] = DistributedSampler(
            self.val_examples, self.trainer.world_size, self.global_rank, shuffle=False
        )
        return self._loader(self.val_examples, sampler=self.val_sampler)

    def _loader(self, examples: Examples, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            ErrorsAsValues(examples),
            collate_fn=_collate,
            num_workers=self.config.data.workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            **options,
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Raise the error of an unreadable file, and remember skipped files."""
        if "error" in batch:
            raise batch["error"]
        self.skipped.update(batch["skipped"])
        return batch

    def configure_optimizers(self) -> Any:
        """Create the optimizer and its schedule."""
        config = self.config.training
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                factor = 1.0 if name.startswith("backbone.") else config.head_learning_rate
                decays = parameter.dim() > 1 or config.decay_norm_and_bias
                key = (config.learning_rate * factor, config.weight_decay * decays)
                groups.setdefault(key, []).append(parameter)
        optimizer = torch.optim.SGD(
            [
                {"params": parameters, "lr": rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ],
            lr=config.learning_rate,
            momentum=config.momentum,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, config)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Compute the loss of one accumulation step, as a mean over all pixels."""
        config = self.config.training
        torch.manual_seed(
            random_seed(config.seed, self.global_step, len(self._sums), self.global_rank)
        )
        outputs = self.model(batch["image"])
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        target = batch["mask"]
        main, *auxiliary = (
            F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
            for logits in outputs
        )
        loss = main + sum(config.auxiliary_weight * each for each in auxiliary)
        labelled = (target != IGNORE_INDEX).sum()
        # float64: a float32 cannot count the pixels of a large batch.
        self._sums.append(torch.stack([loss.detach().double(), labelled.double()]))
        self._images += batch["name"]
        # A mean over all pixels, whose number is always the same. The sum could overflow in half
        # precision.
        mean: Tensor = loss / target.numel()
        return mean

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the number of labelled pixels, and check and clip them."""
        config = self.config.training
        sums = self.trainer.strategy.reduce(torch.stack(self._sums).sum(dim=0), reduce_op="sum")
        assert isinstance(sums, Tensor)
        # The gradient of a batch without labels is 0, not 0 / 0.
        total, labelled = sums[0], sums[1].clamp(min=1)
        gradients = [each.grad for each in self.parameters() if each.grad is not None]
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        norm: Any = torch.linalg.vector_norm(torch.stack(norms))
        if hasattr(norm, "full_tensor"):  # a sharded network
            norm = norm.full_tensor()
        # From the mean over all pixels of the step to the mean over the labelled ones.
        factor = config.batch_size * math.prod(self.config.data.crop) / labelled
        norm = norm * factor
        self._check_finite(total, norm)
        if (limit := config.clip_gradient_norm) is not None:
            factor = factor * (limit / norm.clamp(min=limit))
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
        self.log("train/loss", total / labelled)
        self.log("train/gradient_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        self._sums, self._images = [], []

    def _check_finite(self, loss: Tensor, norm: Tensor) -> None:
        finite_loss, finite_norm = torch.stack([loss, norm.double()]).isfinite().tolist()
        # Gradients in half precision sometimes overflow; the gradient scaler then skips the step.
        if finite_loss and (finite_norm or self.config.training.precision == "16-mixed"):
            return
        raise NonFiniteError(
            f"step {self.global_step + 1}: the {'gradient' if finite_loss else 'loss'} is not "
            f"finite; images of the step on rank {self.global_rank}: {', '.join(self._images)}; "
            "try a lower training.learning_rate or training.clip_gradient_norm"
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count the pixels of an image by true and predicted class."""
        logits = self.model(batch["image"])
        # Not twice: neither a repeated image, nor the neighbour that replaces a skipped image.
        if not (is_repeated(self.val_sampler, batch_idx) or batch["skipped"]):
            self.confusion.update(logits.argmax(dim=1), batch["mask"])

    def on_validation_epoch_end(self) -> None:
        """Compute the scores from the counts of all processes."""
        counts = self.confusion.compute().cpu()
        self.confusion.reset()
        self.scores = Scores(counts, self.dataset.classes, self.dataset.groups)
        values = {"mean_iou": self.scores.mean_iou, "pixel_accuracy": self.scores.pixel_accuracy}
        values |= {f"mean_iou_{group}": mean for group, mean in self.scores.group_means.items()}
        for name, value in values.items():
            self.log(f"val/{name}", value, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `models.files.load` needs, and the configuration for resumed runs."""
        description = Description(
            model=describe(self.model),
            dataset=self.dataset.name,
            classes=self.dataset.classes,
            palette=self.dataset.palette,
            groups=self.dataset.groups,
            mean=self.config.data.mean,
            std=self.config.data.std,
            step=self.global_step,
        )
        checkpoint["fullattn"] = description.plain()
        checkpoint["fullattn_config"] = self.config.plain()


class ShardedSegmentation(Segmentation):
    """Segmentation with parameters sharded over all processes."""

    def configure_model(self) -> None:
        """Shard the parameters."""
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
