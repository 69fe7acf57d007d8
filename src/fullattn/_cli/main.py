"""The command line: what layers cost, and networks with them trained, evaluated and used.

A bad request ends with one sentence on standard error and exit status 2, Ctrl-C with 130; neither
writes a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fullattn._cli.arguments import Parser
from fullattn._cli.errors import UsageError, sentences
from fullattn._version import __version__

__all__ = ["COMMANDS", "main", "parser_of"]

# Each command: where the function is that adds its arguments to a parser, and a line of help. Only
# the module of the command that runs is imported.
COMMANDS = {
    "bench": ("fullattn.bench.command:configure", "compare what layers and backends cost"),
    "swap": (
        "fullattn.swap.command:configure",
        "put a layer into a network and see what that costs",
    ),
    "train": ("fullattn.segmentation.training.command:configure", "train a network on a data set"),
    "evaluate": (
        "fullattn.segmentation.evaluation.command:configure_evaluate",
        "score a trained network on a data set",
    ),
    "predict": (
        "fullattn.segmentation.evaluation.command:configure_predict",
        "segment photographs, and show what the layer attends to",
    ),
    "maps": (
        "fullattn.segmentation.evaluation.command:configure_maps",
        "see what the layers attend to in a photograph",
    ),
    "yolo": ("fullattn.integrations.command:configure", "Ultralytics' command, with the layers"),
    "info": ("fullattn._cli.info:configure", "say which backend runs, and why the others do not"),
}


def parser_of(*chosen: str) -> argparse.ArgumentParser:
    """Build the parser, with the arguments of the chosen commands alone."""
    parser = Parser(
        prog="fullattn",
        description="Attention layers for 2-D feature maps: what they cost, and what runs them.",
    )
    parser.add_argument("--version", action="version", version=f"fullattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (place, help_line) in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_line, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in chosen:
            module, _, configure = place.partition(":")
            with sentences():  # a missing package
                getattr(import_module(module), configure)(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for the process's own.

    Returns:
        Exit status: 0; 2 for bad input; 130 for an interruption.
    """
    try:
        arguments = sys.argv[1:] if argv is None else list(argv)
        args = parser_of(*arguments[:1]).parse_args(arguments)
        args.run(args)
    except SystemExit as end:  # argparse has printed its help or its sentence
        return end.code if isinstance(end.code, int) else 2
    except UsageError as error:
        print(f"fullattn: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("fullattn: interrupted, nothing was written", file=sys.stderr)  # noqa: T201
        return 130
    return 0
