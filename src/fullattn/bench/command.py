"""`fullattn bench`: compare what layers and backends cost."""

from __future__ import annotations

import argparse

from rich.console import Console

from fullattn._cli.arguments import words
from fullattn._cli.conditions import Mode, conditions_of, modes_named
from fullattn._cli.errors import UsageError
from fullattn._cli.loading import layer_named
from fullattn._cli.shapes import (
    DEFAULT_BUDGET,
    DEFAULT_SHAPES,
    Shape,
    parse_shape,
    sweep_shapes,
)
from fullattn.bench.measure import Plan
from fullattn.bench.results import read_results
from fullattn.bench.run import Options, bench
from fullattn.layers import LAYERS

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run `fullattn bench`."""
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
        layers=[layer_named(layer) for layer in words(args.layers or LAYERS)],
        backends=words(args.backends),
        modules=args.modules,
        baseline=args.baseline,
        sweep=args.sweep,
        plan=Plan(args.seconds, args.repeats, args.limit, budget, not args.no_memory),
    )
    old = None if args.compare is None else read_results(args.compare)
    bench(options, args.output, old, Console())
