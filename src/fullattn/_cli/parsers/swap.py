"""Arguments of `fullattn swap`."""

from __future__ import annotations

from fullattn._cli.arguments import (
    LAYER_HELP,
    Parser,
    add_conditions,
    add_inputs,
    add_repetition,
    setting,
)

__all__ = ["configure"]

_SWAP_EXAMPLES = """\
examples:
  fullattn swap torchvision.models.segmentation:deeplabv3_resnet50 \\
      --target classifier.0 --model-options weights=None weights_backbone=None \\
      --shape 2x3x256x256
  fullattn swap my_net.py:Net --insert --target backbone.layer4 \\
      --layer-options project=False
  fullattn swap segmentation_models_pytorch:Unet \\
      --model-options encoder_weights=None --insert --target encoder.layer4 \\
      --shape 2x3x256x256 --image street.jpg
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn swap`."""
    parser.description = (
        "Put one of the layers into a network that can be imported, in place of a "
        "module or behind it, and print parameters, FLOPs, time and memory before and after."
    )
    parser.epilog = _SWAP_EXAMPLES
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="package.module:FACTORY or FILE.py:FACTORY; the factory builds the network",
    )
    parser.add_argument(
        "--target",
        required=True,
        metavar="NAME",
        help="dotted name of the module, or a glob over dotted names",
    )
    parser.add_argument("--layer", default="fully", metavar="LAYER", help=f"{LAYER_HELP} (fully)")
    parser.add_argument("--insert", action="store_true", help="behind the target, not in its place")
    for name, what in (("--model-options", "the factory"), ("--layer-options", "the layer")):
        parser.add_argument(
            name,
            nargs="+",
            type=setting,
            default=[],
            metavar="NAME=VALUE",
            help=f"what {what} is called with, beside its defaults",
        )
    parser.add_argument(
        "--shape",
        default="1x3x512x512",
        metavar="SHAPE",
        help="of the images, CxHxW or BxCxHxW (1x3x512x512)",
    )
    parser.add_argument("--image", metavar="PHOTO", help="a photograph as input, in place of noise")
    parser.add_argument(
        "--mode", choices=("inference", "training", "both"), default="both", help="(both)"
    )
    add_conditions(parser)
    add_inputs(parser)
    # A network takes longer than a layer.
    add_repetition(parser, limit=30.0, budget=60.0)
    parser.set_defaults(
        run="fullattn.swap.command:run",
        needs=("the comparison", "bench", "rich", "matplotlib", "PIL"),
        project=False,
    )
