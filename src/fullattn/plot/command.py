"""`fullattn maps`: draw the layers' similarity maps for a photograph."""

from __future__ import annotations

import argparse
from pathlib import Path

from fullattn._cli.arguments import Parser, count, index, number, point, seed, words
from fullattn._cli.errors import UsageError, sentences
from fullattn._cli.loading import layer_named
from fullattn._cli.output import written_together
from fullattn.layers import LAYERS
from fullattn.segmentation.models.command_input import read_trained

__all__ = ["configure"]

_EXAMPLES = """\
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
    parser.epilog = _EXAMPLES
    parser.add_argument("photograph", type=Path, metavar="PHOTO")
    parser.add_argument(
        "--output", type=Path, default=Path("out/maps"), metavar="DIR", help="(out/maps)"
    )
    parser.add_argument(
        "--point",
        type=point,
        metavar="X,Y",
        help="pixel of the photograph, from its top left corner (the centre)",
    )
    parser.add_argument(
        "--channel",
        type=index,
        metavar="C",
        help="also draw the channels that this channel attends to",
    )
    parser.add_argument(
        "--longest",
        type=count,
        default=512,
        metavar="PIXELS",
        help="a photograph with a longer side is scaled down to this (512)",
    )
    source = parser.add_argument_group("source of the layers").add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="draw the layers of a network of `fullattn train`",
    )
    source.add_argument(
        "--backbone",
        metavar="NAME",
        help="use features of a timm network, with downloaded weights (a random stem)",
    )
    untrained = parser.add_argument_group("untrained layers")
    untrained.add_argument(
        "--weights", type=Path, metavar="FILE", help="the backbone's weights, instead of a download"
    )
    untrained.add_argument(
        "--layers", nargs="+", metavar="LAYER", help=f"{', '.join(LAYERS)} (all)"
    )
    untrained.add_argument(
        "--scale", type=number, help="factor on the scores; the papers use 1 (4/d, softer)"
    )
    untrained.add_argument(
        "--channels", type=count, metavar="C", help="channels of the random stem (64)"
    )
    untrained.add_argument("--seed", type=seed, help="of the random stem (0)")
    parser.set_defaults(run=_maps)


def _check(args: argparse.Namespace) -> list[str]:
    """Check that the options fit together, and return the names of the layers."""
    excluded = {
        "checkpoint": ("weights", "layers", "scale", "channels", "seed"),
        "backbone": ("channels", "seed"),
    }
    for source, names in excluded.items():
        for name in names:
            if getattr(args, source) is not None and getattr(args, name) is not None:
                raise UsageError(f"expected no --{name} with --{source}")
    if args.weights is not None and args.backbone is None:
        raise UsageError("expected --backbone NAME with --weights")
    layers = [layer_named(layer) for layer in words(args.layers or list(LAYERS))]
    return list(dict.fromkeys(layers))


def _maps(args: argparse.Namespace) -> None:
    layers = _check(args)
    with sentences():
        from fullattn.segmentation.evaluation import maps

        photograph = maps.read(args.photograph, args.longest)
        if args.point is not None:
            photograph.scale_point(args.point)
    if photograph.scaled:
        print(photograph.scaled)  # noqa: T201
    with sentences():
        if args.checkpoint is not None:
            seen = maps.of_network(read_trained(args.checkpoint), photograph)
        elif args.backbone is not None:
            try:
                seen = maps.of_backbone(photograph, layers, args.backbone, args.weights, args.scale)
            except FileNotFoundError as error:
                raise UsageError(
                    f"expected weights at {str(args.weights)!r}: no such file"
                ) from error
        else:
            stem = args.channels or 64, args.scale, args.seed or 0
            seen = maps.of_stem(photograph, layers, *stem)
    with written_together(args.output) as folder, sentences():
        written = maps.write(seen, photograph, folder, point=args.point, channel=args.channel)
    for path in written:
        print(args.output / path.name)  # noqa: T201
