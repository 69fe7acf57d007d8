"""Ultralytics on this machine, and images with boxes to train on."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from fullattn.integrations.torchvision import ensure_importable

# Task, and a network of it. YOLO12 has its own attention blocks; 26 is the newest.
NETWORKS = {
    "detect": ("yolov8n.yaml", "yolo11n.yaml", "yolo12n.yaml", "yolo26n.yaml"),
    "segment": ("yolo11n-seg.yaml",),
    "pose": ("yolo11n-pose.yaml",),
}
BATCH: dict[str, Any] = {
    "imgsz": 64,
    "batch": 4,
    "workers": 0,
    "device": "cpu",
    "plots": False,
    "verbose": False,
    "exist_ok": True,
}


def ready() -> Any:
    """Import ultralytics, offline, with settings of its own and an NMS that needs no kernel.

    Its import sets how NumPy and PyTorch print; both are set back.
    """
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="yolo"))
    os.environ["YOLO_OFFLINE"] = "true"
    ensure_importable()
    printing = copy.copy(torch._tensor_str.PRINT_OPTS)
    with np.printoptions(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchvision
        import ultralytics
        from ultralytics.utils.nms import TorchNMS
    torch._tensor_str.PRINT_OPTS = printing
    try:
        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except RuntimeError:  # torchvision's compiled operators are for another PyTorch
        torchvision.ops.nms = TorchNMS.nms
    return ultralytics


def draw(folder: Path, task: str = "detect", train: int = 8, val: int = 4) -> Path:
    """Write images of discs and boxes with labels of a task; return the dataset's YAML."""
    rng = np.random.default_rng(0)
    for split, images in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(images):
            image = Image.fromarray(rng.integers(0, 80, (64, 64, 3), dtype=np.uint8))
            pen, lines = ImageDraw.Draw(image), []
            for _ in range(2):
                w, h = (int(size) for size in rng.integers(16, 30, 2))
                x, y = int(rng.integers(0, 64 - w)), int(rng.integers(0, 64 - h))
                shape = int(rng.integers(2))
                (pen.rectangle if shape else pen.ellipse)(
                    (x, y, x + w, y + h), (250, 60 * shape, 0)
                )
                lines.append(_label(task, shape, x / 64, y / 64, w / 64, h / 64))
            image.save(folder / "images" / split / f"{number}.png")
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    points = "kpt_shape: [2, 3]\n" if task == "pose" else ""
    path = folder / "data.yaml"
    path.write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [disc, box]\n{points}"
    )
    return path


def _label(task: str, shape: int, x: float, y: float, w: float, h: float) -> str:
    if task == "segment":
        corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
        return f"{shape} " + " ".join(f"{a} {b}" for a, b in corners)
    box = f"{shape} {x + w / 2} {y + h / 2} {w} {h}"
    return f"{box} {x} {y} 2 {x + w} {y + h} 2" if task == "pose" else box
