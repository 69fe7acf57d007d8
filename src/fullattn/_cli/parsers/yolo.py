"""Arguments of `fullattn yolo`."""

from __future__ import annotations

import argparse

from fullattn._cli.arguments import Parser

__all__ = ["configure"]

_YOLO_EXAMPLES = """\
examples:
  fullattn yolo train model=yolo11n-fully.yaml pretrained=yolo11n.pt \\
      data=coco8.yaml epochs=3
  fullattn yolo predict model=runs/detect/train/weights/best.pt \\
      source=street.jpg
  fullattn yolo export model=runs/detect/train/weights/best.pt \\
      format=onnx dynamic=True
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
    parser.set_defaults(
        run="fullattn.integrations.command:run",
        needs=("fullattn yolo", "ultralytics", "ultralytics"),
    )
