"""`fullattn swap`: put a layer into a network and see what that costs."""

from __future__ import annotations

import argparse

from rich.console import Console

from fullattn._cli.conditions import conditions_of, modes_named
from fullattn._cli.errors import UsageError
from fullattn._cli.loading import layer_named
from fullattn._cli.shapes import parse_shape
from fullattn.bench.measure import Plan
from fullattn.swap.before_after import compare
from fullattn.swap.network import Network

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run `fullattn swap`."""
    shape = parse_shape(args.shape)
    if args.image is not None and shape.channels != 3:
        raise UsageError(f"expected a shape of 3 channels for --image, got {shape}")
    network = Network(
        factory=args.model,
        options=dict(args.model_options),
        shape=shape,
        conditions=conditions_of(args),
        target=args.target,
        layer=layer_named(args.layer),
        layer_options=dict(args.layer_options),
        behind=args.insert,
    )
    plan = Plan(args.seconds, args.repeats, args.limit, args.budget, not args.no_memory)
    compare(network, modes_named(args.mode), plan, Console())
