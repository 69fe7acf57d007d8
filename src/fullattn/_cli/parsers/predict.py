"""Arguments of `fullattn predict`."""

from __future__ import annotations

from pathlib import Path

from fullattn._cli import arguments
from fullattn._cli.arguments import Parser

__all__ = ["configure"]

_PREDICT_EXAMPLES = """\
examples:
  fullattn predict street.jpg --checkpoint last.ckpt --output out
  fullattn predict street.jpg --checkpoint last.ckpt --output out --maps \\
      --point 320,240
  fullattn predict photos/*.jpg --checkpoint last.ckpt --output out \\
      --labels --scales 0.75 1 1.25
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn predict`."""
    parser.description = (
        "Segment photographs and draw the classes in colour over them, with a legend; optionally "
        "write the labels and the similarity maps of the attention layer."
    )
    parser.epilog = _PREDICT_EXAMPLES
    add = parser.add_argument
    add("photographs", nargs="+", type=Path, metavar="PHOTO")
    add("--checkpoint", **arguments.FILE, required=True, help="a file of `fullattn train`")
    add("--output", **arguments.FOLDER, required=True, help="folder of the written images")
    add("--alpha", type=arguments.number, default=0.5, help="opacity of the colours, 0 to 1 (0.5)")
    add("--labels", action="store_true", help="write PHOTO_labels.png, the class indices, too")
    maps = parser.add_argument_group("similarity maps of the attention layer")
    maps.add_argument("--maps", action="store_true", help="draw them, at a point or a channel")
    where = maps.add_mutually_exclusive_group()
    where.add_argument("--point", **arguments.POINT, help="pixel, from the top left")
    where.add_argument("--channel", **arguments.CHANNEL, help="index of a channel, from 0")
    arguments.add_passes(parser)
    arguments.add_device(parser)
    parser.set_defaults(run="fullattn.segmentation.evaluation.command:predict")
