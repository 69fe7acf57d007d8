"""`fullattn yolo`: Ultralytics' `yolo` command with the layers."""

from __future__ import annotations

import argparse
import sys

from fullattn._cli.arguments import Parser, need_packages
from fullattn._cli.errors import sentences

__all__ = ["configure"]

_YOLO_EXAMPLES = """\
examples:
  fullattn yolo train model=yolo11n-fully.yaml pretrained=yolo11n.pt data=coco8.yaml epochs=3
  fullattn yolo predict model=runs/detect/train/weights/best.pt source=street.jpg
  fullattn yolo export model=runs/detect/train/weights/best.pt format=onnx dynamic=True
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn yolo`."""
    parser.description = (
        "Run Ultralytics' yolo command. A YAML may then name the layers in its rows, or under its "
        "key `fullattn`."
    )
    parser.epilog = _YOLO_EXAMPLES
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="as of the command yolo"
    )
    parser.set_defaults(run=_yolo)


def _yolo(args: argparse.Namespace) -> None:
    need_packages("fullattn yolo", "ultralytics", "ultralytics")
    sys.argv = ["yolo", *args.arguments]  # Ultralytics reads them when it is imported
    from ultralytics.cfg import entrypoint

    from fullattn.integrations.ultralytics import register

    register()
    with sentences():
        entrypoint()
