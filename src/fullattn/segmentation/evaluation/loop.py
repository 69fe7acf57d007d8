"""Running a network over a data set and counting what it gets right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fullattn.segmentation.evaluation.passes import check_options, segment
from fullattn.segmentation.evaluation.scores import Scores, confusion_matrix

if TYPE_CHECKING:
    from fullattn.segmentation.data import DataError, SegmentationDataset

__all__ = ["PRECISIONS", "Precision", "evaluate", "evaluating", "normalised"]

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")

# An image and its mask, or why they cannot be read.
_Read: TypeAlias = "tuple[Tensor, Tensor] | DataError"


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 1,
    workers: int = 0,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    skip_bad: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Scores:
    """Segment every image of a data set and compare the classes with its masks.

    Images keep their size. Neighbours of the same size are run as one batch; what they score does
    not depend on that.

    Args:
        model: takes normalised images (B, 3, H, W) to logits (B, K, H, W) in evaluation mode, in
            which it runs; its modules are then put back into the modes that they were in.
        dataset: with masks for all its images.
        mean: of the images that the model was trained on, in 0 to 1, for each colour.
        std: their standard deviation.
        scales: as in `segment`, likewise flip, window and stride.
        flip: see scales.
        window: see scales.
        stride: see scales.
        indices: of the samples to use; None for all.
        batch_size: at most so many images at once.
        workers: processes that read files; 0 to read in this one.
        device: to run on, to which the model is moved; None for where its parameters are.
        precision: of convolutions and products, by autocast; averages are always float32.
        skip_bad: whether files that cannot be read are left out. The scores list them, after
            those that the data set dropped when it was opened.
        progress: called with the number of images of each batch when it is done.

    Returns:
        The scores, on the CPU.

    Raises:
        DataError: an image or mask cannot be read, and `skip_bad` is off.
        ValueError: an option cannot be used; an image has no mask; no image can be read, or none
            has a labelled pixel; or the model's output is not logits for the classes.
        ImportError: torchmetrics is missing.

    Example:
        >>> from fullattn.segmentation.data import open_dataset  # doctest: +SKIP
        >>> dataset = open_dataset("camvid", "data/camvid", "test")  # doctest: +SKIP
        >>> evaluate(net, dataset, mean=mean, std=std).mean_iou  # doctest: +SKIP
        0.61
    """
    from fullattn.segmentation.data import DataError

    check_options(scales, window, stride)
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision of {', '.join(PRECISIONS)}, got {precision!r}")
    if batch_size < 1:
        raise ValueError(f"expected a batch size of at least 1, got {batch_size}")
    chosen = list(range(len(dataset.samples)) if indices is None else indices)
    if not chosen:
        raise ValueError(f"expected images to evaluate on, got none of {dataset.name}")
    for index in chosen:
        if dataset.samples[index].mask is None:
            raise ValueError(f"{dataset.samples[index].image} has no mask to compare with")
    device = torch.device(device or _device_of(model))
    number = len(dataset.classes)
    confusion = confusion_matrix(number, dataset.ignore_index).to(device)
    skipped = [str(problem.path) for problem in dataset.dropped]

    def readable() -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Files(dataset, chosen),
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        for index, read in zip(chosen, loader, strict=True):
            if not isinstance(read, DataError):
                yield read
            elif skip_bad:
                skipped.append(str((*read.paths, dataset.samples[index].image)[0]))
            else:
                raise read

    def network(images: Tensor) -> Tensor:
        with torch.autocast(
            device.type, dtype=getattr(torch, precision), enabled=precision != "float32"
        ):
            logits: Tensor = model(images)
        return logits

    images = 0
    with evaluating(model.to(device)), torch.inference_mode():
        for batch, masks in _batches(readable(), batch_size):
            probabilities = segment(
                network,
                normalised(batch.to(device), mean, std),
                scales=scales,
                flip=flip,
                window=window,
                stride=stride,
            )
            if probabilities.shape[1] != number:
                raise ValueError(
                    f"expected a network of {dataset.name}'s {number} classes, "
                    f"got one of {probabilities.shape[1]}"
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
    """Images as a network takes them.

    Args:
        images: uint8, (B, 3, H, W).
        mean: in 0 to 1, for each colour.
        std: standard deviation, likewise.

    Returns:
        (images / 255 - mean) / std, float32, (B, 3, H, W).
    """
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - centre) / spread


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards each module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Files(Dataset[_Read]):
    """The samples as they are read. What cannot be read is a value here.

    An error that is raised in a worker ends the loader, with a traceback for a message.
    """

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> _Read:
        from fullattn.segmentation.data import DataError

        try:
            return self.dataset.read(self.indices[place])
        except DataError as error:
            return error


def _batches(
    examples: Iterable[tuple[Tensor, Tensor]], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Stack neighbours of one size, at most `batch_size` of them."""
    batch: list[tuple[Tensor, Tensor]] = []
    for image, mask in examples:
        if batch and (len(batch) == batch_size or batch[0][0].shape != image.shape):
            yield _stacked(batch)
            batch = []
        batch.append((image, mask))
    if batch:
        yield _stacked(batch)


def _stacked(batch: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*batch, strict=True)
    return torch.stack(images), torch.stack(masks).long()


def _device_of(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
