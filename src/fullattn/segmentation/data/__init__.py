"""Datasets for semantic segmentation: images and masks on disk, and augmented examples of them.

>>> from fullattn import data
>>> dataset = data.open_dataset("camvid", "path/to/camvid", "train+val")  # doctest: +SKIP
>>> dataset.check().raise_for_problems()                                  # doctest: +SKIP
>>> examples = data.Examples(dataset, data.Augment(crop=(352, 480)))      # doctest: +SKIP
>>> loader = torch.utils.data.DataLoader(                                 # doctest: +SKIP
...     examples, batch_size=8, shuffle=True, collate_fn=data.collate
... )
"""

from fullattn._text import installing

try:
    import numpy  # noqa: F401
    import PIL  # noqa: F401
except ImportError as _error:
    raise ImportError(
        f"fullattn.segmentation.data needs NumPy and Pillow: {installing('data')} ({_error})"
    ) from _error

from fullattn.segmentation.data.classes import IGNORE_INDEX, Classes
from fullattn.segmentation.data.dataset import (
    SegmentationDataset,
    SmallestImage,
    open_dataset,
    smallest_image,
)
from fullattn.segmentation.data.decode import read_image
from fullattn.segmentation.data.examples import Examples, collate
from fullattn.segmentation.data.files import DataError, DatasetReport, FileIssue, Sample
from fullattn.segmentation.data.folder_layouts import LAYOUTS
from fullattn.segmentation.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augment, Normalize

DATASETS = tuple(LAYOUTS)

__all__ = [
    "DATASETS",
    "IGNORE_INDEX",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Augment",
    "Classes",
    "DataError",
    "DatasetReport",
    "Examples",
    "FileIssue",
    "Normalize",
    "Sample",
    "SegmentationDataset",
    "SmallestImage",
    "collate",
    "open_dataset",
    "read_image",
    "smallest_image",
]
