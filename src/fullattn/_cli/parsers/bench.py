"""Arguments of `fullattn bench`."""

from __future__ import annotations

from pathlib import Path

from fullattn._cli.arguments import (
    LAYER_HELP,
    Parser,
    add_conditions,
    add_inputs,
    add_repetition,
)
from fullattn._cli.shapes import DEFAULT_BUDGET, NAMED

__all__ = ["configure"]

_BENCH_EXAMPLES = f"""\
examples:
  fullattn bench
  fullattn bench --shapes 512x97x97 8x512x96x96 cityscapes --mode inference
  fullattn bench --layers fully --backends all --dtype bfloat16
  fullattn bench --layers fully --sweep resolution --shapes 512x128x128
  fullattn bench --shapes 97 --module my_block.py:MyBlock \\
      --baseline my_block:MyBlock
  fullattn bench --image street.jpg
  fullattn bench --output out/now --compare out/before/bench.json

shapes by name:
{chr(10).join(f"  {name:<14} {shape!s:<11} {what}" for name, (shape, what) in NAMED.items())}
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn bench`."""
    parser.description = (
        "Compare the layers, their backends, the official implementation and your "
        "own modules: parameters, FLOPs, time, peak memory. Prints tables, writes JSON and a "
        "picture."
    )
    parser.epilog = _BENCH_EXAMPLES
    what = parser.add_argument_group("what is compared")
    what.add_argument("--layers", nargs="+", metavar="LAYER", help=LAYER_HELP)
    what.add_argument(
        "--backends",
        nargs="+",
        default=["default"],
        metavar="BACKEND",
        help="names of backends; auto: the automatic choice; all: every one "
        "that can run; default: the automatic one, and the map built and fused. With auto, channel "
        "and spatial are still run both built and fused",
    )
    what.add_argument(
        "--module",
        "--contender",
        dest="modules",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help="your own module, or package.module:CLASS; the class is called with the number of "
        "channels, the module with a (B, C, H, W) tensor. May be given several times",
    )
    what.add_argument(
        "--baseline",
        default="official",
        metavar="NAME",
        help="the implementation that ratios refer to: official, fully, channel:reference, "
        "my_block:MyBlock, ... (official)",
    )
    what.add_argument(
        "--project",
        action="store_true",
        help="with the 3x3 projection of FullyAttentional and of the official implementation, "
        "which is left out so that attention is compared with attention",
    )
    at = parser.add_argument_group("at which shapes and conditions")
    at.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help="CxHxW, BxCxHxW or names, listed below"
    )
    at.add_argument(
        "--sweep",
        choices=("resolution", "channels"),
        help="five sizes up to the shape given, with a picture of how cost grows",
    )
    at.add_argument(
        "--mode",
        choices=("inference", "training", "both"),
        help="forward, forward and backward, or both (both; without --shapes, the paper's size is "
        "run forward only)",
    )
    add_conditions(at)
    at.add_argument(
        "--image",
        metavar="PHOTO",
        help="make the inputs from a photograph, through a small random convolutional stem",
    )
    add_inputs(at)
    how = parser.add_argument_group("how it is measured")
    otherwise = " without --shapes and --sweep, otherwise none"
    add_repetition(how, limit=10.0, budget=DEFAULT_BUDGET, when=otherwise)
    out = parser.add_argument_group("what comes out")
    out.add_argument(
        "--output",
        type=Path,
        default=Path("out/bench"),
        metavar="DIR",
        help="folder of bench.json and bench.png, or sweep.json and sweep.png (out/bench)",
    )
    out.add_argument(
        "--compare",
        metavar="OLD.json",
        help="show what became slower than in an earlier run, beyond the noise",
    )
    parser.set_defaults(
        run="fullattn.bench.command:run",
        needs=("the benchmark", "bench", "rich", "matplotlib", "PIL"),
    )
