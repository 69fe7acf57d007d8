"""Arguments of `fullattn maps`."""

from __future__ import annotations

from pathlib import Path

from fullattn._cli import arguments
from fullattn._cli.arguments import Parser

__all__ = ["configure"]

_MAPS_EXAMPLES = """\
examples:
  fullattn maps street.jpg
  fullattn maps street.jpg --point 320,240 --channel 5 --output out/street
  fullattn maps street.jpg --checkpoint last.ckpt
  fullattn maps street.jpg --backbone resnet50
  fullattn maps street.jpg --layers fully --scale 1
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn maps`."""
    parser.description = (
        "Draw each layer's similarity maps for a photograph: the positions that a pixel attends "
        "to, the channels that a channel attends to, and the maps of a column and a row beside the "
        "channel layer's only map. Writes PHOTO_LAYER.png for each layer, and PHOTO_maps.html, a "
        "page in which a click on the photograph moves the point. Without --checkpoint, untrained "
        "layers compare the features without learned weights."
    )
    parser.epilog = _MAPS_EXAMPLES
    add = parser.add_argument
    add("photograph", type=Path, metavar="PHOTO")
    add("--output", **arguments.FOLDER, default=Path("out/maps"), help="(out/maps)")
    add(
        "--point",
        **arguments.POINT,
        help="pixel of the photograph, from its top left corner (the centre)",
    )
    add(
        "--channel", **arguments.CHANNEL, help="also draw the channels that this channel attends to"
    )
    longest = "a photograph with a longer side is scaled down to this (512)"
    add("--longest", type=arguments.count, default=512, metavar="PIXELS", help=longest)
    source = parser.add_argument_group("source of the layers").add_mutually_exclusive_group()
    add = source.add_argument
    add("--checkpoint", **arguments.FILE, help="draw the layers of a network of `fullattn train`")
    backbone = "use features of a timm network, with downloaded weights (a random stem)"
    add("--backbone", metavar="NAME", help=backbone)
    add = parser.add_argument_group("untrained layers").add_argument
    add("--weights", **arguments.FILE, help="the backbone's weights, instead of a download")
    add("--layers", nargs="+", metavar="LAYER", help=f"{', '.join(arguments.LAYER_NAMES)} (all)")
    scale = "factor on the scores; the papers use 1 (4/d, softer)"
    add("--scale", type=arguments.number, help=scale)
    add("--channels", type=arguments.count, metavar="C", help="channels of the random stem (64)")
    add("--seed", type=arguments.seed, help="of the random stem (0)")
    parser.set_defaults(run="fullattn.segmentation.evaluation.command:maps")
