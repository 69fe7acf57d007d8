"""The command line: what layers cost, and networks with them trained, evaluated and used.

A bad request ends with one sentence on standard error and exit status 2, Ctrl-C with 130; neither
writes a file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from fullattn._cli.arguments import Formatter, Parser, need_packages
from fullattn._cli.errors import UsageError, sentences
from fullattn._cli.terminal import doing
from fullattn._version import __version__

__all__ = ["COMMANDS", "main", "parser_of", "run"]

# Each command and a line of help. Its arguments are in a module of its name in `parsers`; only that
# of the command that runs is imported.
COMMANDS = {
    "bench": "compare what layers and backends cost",
    "swap": "put a layer into a network and see what that costs",
    "train": "train a network on a data set",
    "evaluate": "score a trained network on a data set",
    "predict": "segment photographs, and show what the layer attends to",
    "maps": "see what the layers attend to in a photograph",
    "yolo": "Ultralytics' command, with the layers",
    "info": "say which backend runs, and why the others do not",
}


def parser_of(*chosen: str) -> argparse.ArgumentParser:
    """Build the parser, with the arguments of the chosen commands alone."""
    parser = Parser(
        prog="fullattn",
        description="Attention layers for 2-D feature maps: what they cost, and what runs them.",
    )
    parser.add_argument("--version", action="version", version=f"fullattn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_line in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, formatter_class=Formatter)
        if name in chosen:
            import_module(f"fullattn._cli.parsers.{name}").configure(command)
    return parser


def run(args: argparse.Namespace, load: Callable[[], object] = lambda: None) -> None:
    """Run a command whose arguments were read; `load` is that of `main`.

    Raises:
        UsageError: a package is missing, or the request cannot be done.
    """
    if "needs" in args:
        need_packages(*args.needs)
    module, _, function = args.run.partition(":")
    with doing(f"fullattn {args.command}: importing PyTorch"), sentences():
        load()
        command = getattr(import_module(module), function)
    command(args)


def main(argv: Sequence[str] | None = None, load: Callable[[], object] = lambda: None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for the process's own.
        load: imports the package `fullattn`, after the arguments were read without it.

    Returns:
        Exit status: 0; 2 for bad input; 130 for an interruption.
    """
    try:
        arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
        args = parser_of(*arguments[:1]).parse_args(arguments)
        run(args, load)
    except SystemExit as end:  # argparse has printed its help or its sentence
        return end.code if isinstance(end.code, int) else 2
    except UsageError as error:
        print(f"fullattn: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("fullattn: interrupted, nothing was written", file=sys.stderr)  # noqa: T201
        return 130
    return 0
