"""`fullattn bench`: compare what layers and backends cost."""

from __future__ import annotations

import argparse
from pathlib import Path

from fullattn._cli.arguments import (
    LAYER_HELP,
    Parser,
    add_conditions,
    add_inputs,
    add_repetition,
    conditions_of,
    modes_named,
    need_packages,
    words,
)
from fullattn._cli.conditions import Mode
from fullattn._cli.errors import UsageError
from fullattn._cli.loading import layer_named
from fullattn._cli.shapes import (
    DEFAULT_BUDGET,
    DEFAULT_SHAPES,
    NAMED,
    Shape,
    parse_shape,
    sweep_shapes,
)
from fullattn.bench.implementations import OFFICIAL
from fullattn.layers import LAYERS

__all__ = ["configure"]

_BENCH_EXAMPLES = f"""\
examples:
  fullattn bench
  fullattn bench --shapes 512x97x97 8x512x96x96 cityscapes --mode inference
  fullattn bench --layers fully --backends all --dtype bfloat16
  fullattn bench --layers fully --sweep resolution --shapes 512x128x128
  fullattn bench --shapes 97 --module my_block.py:MyBlock --baseline my_block:MyBlock
  fullattn bench --image street.jpg
  fullattn bench --output out/now --compare out/before/bench.json

shapes by name:
{chr(10).join(f"  {name:<15} {shape!s:<14} {what}" for name, (shape, what) in NAMED.items())}
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
    what.add_argument("--layers", nargs="+", default=list(LAYERS), metavar="LAYER", help=LAYER_HELP)
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
        default=OFFICIAL,
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
        help="forward, forward and backward, or both (both; without --shapes, two of the four "
        "shapes are run forward only)",
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
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    need_packages("the benchmark", "bench", "rich", "matplotlib", "PIL")
    from rich.console import Console

    from fullattn.bench.measure import Plan
    from fullattn.bench.results import read_results
    from fullattn.bench.run import Options, bench

    modes = modes_named(args.mode)
    budget = args.budget
    given = [parse_shape(text) for text in words(args.shapes or [])]
    shapes: list[tuple[Shape, tuple[Mode, ...]]]
    if args.sweep:
        if len(given) > 1:
            raise UsageError(f"expected one shape for --sweep to end at, got {len(given)}")
        largest = given[0] if given else Shape(1, 128, 96, 96)
        shapes = [(shape, modes) for shape in sweep_shapes(largest, args.sweep)]
    elif given:
        shapes = [(shape, modes) for shape in dict.fromkeys(given)]
    else:
        budget = args.budget or DEFAULT_BUDGET
        shapes = [
            (parse_shape(text), modes if args.mode else by_default)
            for text, by_default in DEFAULT_SHAPES
        ]
    options = Options(
        shapes=shapes,
        conditions=conditions_of(args),
        layers=[layer_named(layer) for layer in words(args.layers)],
        backends=words(args.backends),
        modules=args.modules,
        baseline=args.baseline,
        sweep=args.sweep,
        plan=Plan(args.seconds, args.repeats, args.limit, budget, not args.no_memory),
    )
    old = None if args.compare is None else read_results(args.compare)
    bench(options, args.output, old, Console())
