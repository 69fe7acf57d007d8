"""Evaluate a network on a dataset."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fullattn.segmentation.evaluation.passes import PassOptions, check_options, segment
from fullattn.segmentation.evaluation.scores import Scores, confusion_matrix

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

    from fullattn.segmentation.data import SegmentationDataset

__all__ = ["PRECISIONS", "Precision", "evaluate", "evaluating", "normalised"]

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    indices: Sequence[int] | None = None,
    batch_size: int = 1,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    skip_bad: bool = False,
    progress: Callable[[int], object] | None = None,
    **passes: Unpack[PassOptions],
) -> Scores:
    """Segment every image of a dataset and compare the classes with its masks.

    Images keep their size. Consecutive images of the same size are run as one batch, which does not
    change the scores.

    Args:
        model: maps normalised images (B, 3, H, W) to logits (B, K, H, W) in evaluation mode, in
            which it runs; the mode of each module is restored afterwards.
        dataset: images with masks.
        mean: mean of each colour of the training images, in 0..1.
        std: their standard deviation.
        indices: indices of the samples to use; None for all.
        batch_size: largest number of images in a batch.
        workers: number of processes that read files; 0 to read in this one.
        device: device to run on, to which the model is moved; None for that of its parameters.
        precision: precision of convolutions and products, by autocast; averages are float32.
        skip_bad: whether to leave out files that cannot be read. The scores list them, after those
            that the dataset dropped when it was opened.
        progress: called with the number of images after each batch.
        passes: keywords of `segment`: scales, flip, window and stride.

    Returns:
        The scores, on the CPU.

    Raises:
        DataError: an image or mask cannot be read, and `skip_bad` is off.
        ValueError: an option is invalid; an image has no mask; no image can be read or has a
            labelled pixel; or the model's output is not logits for the classes.
        ImportError: torchmetrics is not installed.

    Example:
        >>> from fullattn.segmentation.data import open_dataset  # doctest: +SKIP
        >>> dataset = open_dataset("camvid", "data/camvid", "test")  # doctest: +SKIP
        >>> evaluate(net, dataset, mean=mean, std=std).mean_iou  # doctest: +SKIP
        0.61
    """
    from fullattn.segmentation.data import DataError
    from fullattn.segmentation.data.dataset import ErrorsAsValues

    check_options(**passes)
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision of {', '.join(PRECISIONS)}, got {precision!r}")
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    chosen = list(range(len(dataset.samples)) if indices is None else indices)
    if not chosen:
        raise ValueError(f"expected at least one image of {dataset.name}, got none")
    for index in chosen:
        if dataset.samples[index].mask is None:
            raise ValueError(f"{dataset.samples[index].image} has no mask")
    device = torch.device(device or next((p.device for p in model.parameters()), "cpu"))
    number = len(dataset.classes)
    confusion = confusion_matrix(number, dataset.ignore_index).to(device)
    skipped = [str(problem.path) for problem in dataset.dropped]

    readable = ErrorsAsValues(Subset(dataset, chosen))
    pinned = device.type == "cuda"

    def examples() -> Iterator[tuple[Tensor, Tensor]]:
        for item in DataLoader(readable, None, num_workers=workers, pin_memory=pinned):
            if not isinstance(item, DataError):
                yield item
            elif skip_bad:
                skipped.append(str(item.paths[0]))
            else:
                raise item

    dtype = getattr(torch, precision)
    network = torch.autocast(device.type, dtype, enabled=precision != "float32")(model)
    images = 0
    with evaluating(model.to(device)), torch.inference_mode():
        for batch, masks in _batches(examples(), batch_size):
            inputs = normalised(batch.to(device), mean, std)
            probabilities = segment(network, inputs, **passes)
            if probabilities.shape[1] != number:
                raise ValueError(
                    f"expected a network with the {number} classes of {dataset.name}, "
                    f"got {probabilities.shape[1]}"
                )
            confusion.update(probabilities.argmax(1), masks.to(device))
            images += len(batch)
            if progress is not None:
                progress(len(batch))
    if not images:
        raise ValueError(f"none of {len(chosen)} images of {dataset.name} can be read")
    counts = confusion.compute().cpu()
    if not counts.sum():
        raise ValueError(f"no pixel of {images} images of {dataset.name} is labelled")
    return Scores(counts, dataset.classes, dataset.groups, images, skipped)


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise images for a network: (images / 255 - mean) / std.

    Args:
        images: uint8, (B, 3, H, W).
        mean: mean of each colour, in 0..1.
        std: standard deviation of each colour.

    Returns:
        float32, (B, 3, H, W).
    """
    statistics = torch.tensor([list(mean), list(std)], device=images.device).view(2, 3, 1, 1)
    return (images.float() / 255 - statistics[0]) / statistics[1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(
    examples: Iterable[tuple[Tensor, Tensor]], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack consecutive examples of the same size, at most `batch_size` of them."""
    for _, group in itertools.groupby(examples, key=lambda example: example[0].shape):
        while batch := list(itertools.islice(group, batch_size)):
            images, masks = zip(*batch, strict=True)
            yield torch.stack(images), torch.stack(masks).long()
