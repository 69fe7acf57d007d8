"""torchvision beside a PyTorch that its compiled operators were not built for.

torchvision's wheel for CUDA does not load its operators beside a CPU build of PyTorch. Its import
then ends with "operator torchvision::nms does not exist", as does that of every library that
imports it (timm, segmentation-models-pytorch, Lightning). Models, transforms and datasets need none
of those operators: once their schemas are defined the import succeeds.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["ensure_importable"]

_schemas: list[torch.library.Library] = []  # a library's definitions end with it


def ensure_importable() -> None:
    """Define the schemas of torchvision's operators if its compiled operators cannot be loaded.

    torchvision itself is not imported. Without torchvision, and where its operators load, nothing
    is done; otherwise its compiled operators (nms, deform_conv2d, image decoding) stay unusable.

    Example:
        >>> ensure_importable()
        >>> import torchvision  # doctest: +SKIP
    """
    spec = None if "torchvision" in sys.modules else importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _schemas:
        return
    try:
        for operators in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(operators)  # type: ignore[no-untyped-call]
            return
    except OSError:
        pass
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]  # of an import that failed
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
