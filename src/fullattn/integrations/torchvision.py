"""torchvision beside a PyTorch that its compiled operators were not made for.

torchvision's wheel for CUDA does not load its operators beside a CPU build of PyTorch; its import
then ends with "operator torchvision::nms does not exist", and so does that of every library that
imports it (timm, segmentation-models-pytorch, Lightning). Models, transforms and datasets need none
of those operators: once their schemas are known the import succeeds.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch

__all__ = ["ensure_importable"]

_schemas: list[torch.library.Library] = []  # they are gone when the library object is


def ensure_importable() -> None:
    """Import torchvision, with the schemas of its operators defined where its own do not load.

    Where a plain import works nothing else is done. Where it needed the schemas, torchvision's
    compiled operators (nms, deform_conv2d, image decoding) stay out of use.

    Raises:
        ImportError: torchvision is not installed.

    Example:
        >>> ensure_importable()  # doctest: +SKIP
        >>> import torchvision  # doctest: +SKIP
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
        importlib.import_module("torchvision")
