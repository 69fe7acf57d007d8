"""The network in training: its loss, its optimizer, and what is done around a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fullattn.segmentation.data import IGNORE_INDEX, DataError
from fullattn.segmentation.evaluation.scores import Scores, confusion_matrix
from fullattn.segmentation.training.config import TrainingConfig
from fullattn.segmentation.training.sampling import random_seed

__all__ = ["NonFiniteError", "Segmentation", "learning_rate"]


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is not a number any more; the message names step and images."""


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The factor on the learning rate in a step, counted from 0.

    (1 - step / steps) ** power, and in the warm-up's steps also (step + 1) / warmup_steps.

    Args:
        step: steps that are done.
        config: with `steps`, `power` and `warmup_steps`.

    Returns:
        The factor.
    """
    factor: float = max(0.0, 1 - step / config.steps) ** config.power
    return factor * min(1.0, (step + 1) / max(1, config.warmup_steps))


class Segmentation(LightningModule):
    """A network for semantic segmentation, trained by SGD with momentum and a poly schedule.

    The loss of a step is, over all its pixels with a label, in all images of all processes and
    accumulated parts together,

        mean( cross_entropy(main) ) + auxiliary_weight · Σ_aux mean( cross_entropy(aux) )

    It is not a mean of means: an image with few labelled pixels counts by its pixels. Each part
    gives the gradient of its sum; before the optimizer's step all are divided by the number of
    labelled pixels that they saw together. So N processes, or k accumulated parts, give the
    gradient of one process with the whole batch. Only batch normalisation differs, which takes the
    statistics of one part of one process, or with `sync_batchnorm` of one part of all.

    Random numbers in the network (dropout) are drawn from a seed of (seed, step, part, process).

    Args:
        model: what gives logits (B, K, H, W) at the size of the images, or in training a list of
            them with auxiliary ones behind. Parameters below its attribute "backbone" have the
            plain learning rate, all others `head_learning_rate` times it.
        config: the optimisation.
        classes: names of the K classes.
        groups: named groups of classes, for the evaluation.
        description: what checkpoints hold under "fullattn"; the step is added.
        plain: the whole configuration as plain values, for the checkpoint.

    Attributes:
        skipped: files that could not be read and were left out, in this process.
        scores: of the last evaluation; None before.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        classes: Sequence[str],
        *,
        groups: Mapping[str, Sequence[str]] | None = None,
        description: Mapping[str, Any] | None = None,
        plain: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.classes = list(classes)
        self.groups = dict(groups or {})
        self.description = description
        self.plain = plain
        self.confusion = confusion_matrix(len(self.classes), IGNORE_INDEX)
        self.skipped: set[str] = set()
        self.scores: Scores | None = None
        # Of the parts of a step so far: pixels, names of the images, loss and labelled pixels.
        self._pixels = 0
        self._images: list[str] = []
        self._parts = 0
        self._sums: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images, (B, 3, H, W) to (B, K, H, W)."""
        logits: Tensor = self.model(images)
        return logits

    def configure_model(self) -> None:
        """Shard the parameters where the strategy asks for it."""
        if self.config.strategy != "fsdp" or self.device_mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """SGD, and the schedule that follows its steps."""
        config = self.config
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            head = not name.startswith("backbone.")
            decays = parameter.dim() > 1 or config.decay_norm_and_bias
            rate = config.learning_rate * (config.head_learning_rate if head else 1.0)
            groups.setdefault((rate, config.weight_decay * decays), []).append(parameter)
        optimizer = torch.optim.SGD(
            [
                {"params": parameters, "lr": rate, "weight_decay": decay}
                for (rate, decay), parameters in groups.items()
            ],
            lr=config.learning_rate,
            momentum=config.momentum,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate(step, config)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of one part, whose gradient is still to be divided by the labelled pixels."""
        if "error" in batch:
            raise DataError(f"step {self.global_step + 1}: {batch['error']}")
        self.skipped.update(batch["skipped"])
        seed = random_seed(self.config.seed, self.global_step, self._parts, self.global_rank)
        torch.manual_seed(seed)
        outputs = self.model(batch["image"])
        if isinstance(outputs, Tensor):
            outputs = [outputs]
        target = batch["mask"]
        weights = [1.0] + [self.config.auxiliary_weight] * (len(outputs) - 1)
        losses = [
            weight * F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
            for weight, logits in zip(weights, outputs, strict=True)
        ]
        loss = torch.stack(losses).sum()
        labelled = (target != IGNORE_INDEX).sum()
        # float64: a float32 cannot count the pixels of a large batch.
        sums = torch.stack([loss.detach().double(), labelled.double()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._pixels += target.numel()
        self._images += batch["name"]
        self._parts += 1
        # By all pixels rather than not at all, so that half precision does not overflow; all parts
        # and processes have the same number of pixels.
        mean: Tensor = loss / target.numel()
        return mean

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the labelled pixels of all processes, check and clip them."""
        assert self._sums is not None
        world = self.trainer.world_size
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        # A batch without a single label has the gradient 0, not 0 / 0.
        total, labelled = sums[0], sums[1].clamp(min=1)
        gradients = [each.grad for each in self.parameters() if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):  # of a sharded network
            norm = norm.full_tensor()
        # The gradients so far are those of a mean over all pixels of all parts and processes.
        factor = self._pixels * world / labelled
        norm = norm * factor
        self._check_finite(total, norm)
        if (limit := self.config.clip_gradient_norm) is not None:
            factor = factor * (limit / norm.clamp(min=limit))
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
        self.log("train/loss", total / labelled, prog_bar=True)
        self.log("train/gradient_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        self._pixels, self._images, self._parts, self._sums = 0, [], 0, None

    def _check_finite(self, total: Tensor, norm: Tensor) -> None:
        loss, size = torch.stack([total.double(), norm.double()]).isfinite().tolist()
        # In half precision gradients overflow now and then; the scaler then leaves the step out.
        if loss and (size or self.config.precision == "16-mixed"):
            return
        what = "gradient" if loss else "loss"
        raise NonFiniteError(
            f"step {self.global_step + 1}: the {what} is not finite; the step's images in process "
            f"{self.global_rank} are {', '.join(self._images)}; a lower training.learning_rate or "
            "training.clip_gradient_norm often helps"
        )

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Count the pixels of an image by true and predicted class."""
        if "error" in batch:
            raise DataError(batch["error"])
        self.skipped.update(batch["skipped"])
        logits = self.model(batch["image"])
        # What stands in for an unreadable image is another one, which is counted in its own place.
        if self.trainer.datamodule.counts(batch_idx) and not batch["skipped"]:  # type: ignore[attr-defined]
            self.confusion.update(logits.argmax(dim=1), batch["mask"])

    def on_validation_epoch_end(self) -> None:
        """Compute the scores from the pixels of all processes."""
        self.scores = Scores(self.confusion.compute().cpu(), self.classes, self.groups)
        self.confusion.reset()
        values = {"mean_iou": self.scores.mean_iou, "pixel_accuracy": self.scores.pixel_accuracy}
        values |= {f"mean_iou_{group}": mean for group, mean in self.scores.group_means.items()}
        for name, value in values.items():
            self.log(f"val/{name}", value, prog_bar=name == "mean_iou", sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to use the network without this configuration, and to continue."""
        if self.description is not None:
            checkpoint["fullattn"] = {**self.description, "step": self.global_step}
        if self.plain is not None:
            checkpoint["fullattn_config"] = self.plain
