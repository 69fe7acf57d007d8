"""Arguments that several commands take: types of values, and groups of options."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch

from fullattn._cli.conditions import (
    DTYPES,
    MEMORY_FORMATS,
    MODES,
    Conditions,
    Mode,
    parse_device,
    parse_dtype,
)
from fullattn._cli.errors import UsageError
from fullattn.layers import LAYERS

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "LAYER_HELP",
    "Adds",
    "Parser",
    "add_conditions",
    "add_device",
    "add_inputs",
    "add_repetition",
    "conditions_of",
    "console",
    "count",
    "index",
    "modes_named",
    "need_extra",
    "number",
    "point",
    "seconds",
    "seed",
    "setting",
    "size",
    "words",
]

# Columns that the tables need.
WIDTH = 120
LAYER_HELP = f"{', '.join(LAYERS)}, or FILE.py:CLASS of a layer that is registered there"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


# A parser, or a group of its arguments.
Adds: TypeAlias = argparse.ArgumentParser | argparse._ArgumentGroup


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """Parse a seed of a random number generator."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """Parse a finite time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def words(values: Sequence[str]) -> list[str]:
    """Split values that are given one by one or with commas between them."""
    return [word for value in values for word in value.split(",") if word]


def setting(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE, the value as a Python literal or else as text."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def number(text: str) -> float:
    """Parse a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def index(text: str) -> int:
    """Parse a whole number from 0."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _pair(text: str, separator: str, form: str) -> tuple[int, int]:
    numbers = text.split(separator)
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() for n in numbers):
        raise argparse.ArgumentTypeError(f"expected {form}, got {text!r}")
    return int(numbers[0]), int(numbers[1])


def size(text: str) -> tuple[int, int]:
    """Parse HxW."""
    return _pair(text, "x", "HxW such as 512x1024")


def point(text: str) -> tuple[int, int]:
    """Parse X,Y."""
    return _pair(text, ",", "X,Y such as 320,240")


def add_device(parser: Adds) -> None:
    """Add --device."""
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (cpu)")


def add_conditions(parser: Adds) -> None:
    """Add --dtype and --device."""
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPE", help=f"{', '.join(DTYPES)} (float32)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (cpu)")


def add_inputs(parser: Adds) -> None:
    """Add --memory-format, --seed and --threads."""
    parser.add_argument(
        "--memory-format",
        default="contiguous",
        metavar="FORMAT",
        help=f"{' or '.join(MEMORY_FORMATS)} (contiguous)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of parameters and inputs (0)")
    parser.add_argument("--threads", type=count, help="PyTorch's threads (PyTorch's own choice)")


def add_repetition(parser: Adds) -> None:
    """Add --seconds, --repeats and --no-memory."""
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=2.0,
        help="to spend on timing one implementation at one shape in one mode; 3 to 20 calls (2)",
    )
    parser.add_argument("--repeats", type=count, help="time exactly so many calls of each instead")
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="do not measure peak memory; saves one process and one call for every figure, and the "
        "check that a row fits into memory before it is timed",
    )


def conditions_of(args: argparse.Namespace) -> Conditions:
    """Check the options of `add_conditions` and `add_inputs`."""
    parse_dtype(args.dtype)
    parse_device(args.device)
    if args.memory_format not in MEMORY_FORMATS:
        allowed = " or ".join(MEMORY_FORMATS)
        raise UsageError(f"expected a memory format of {allowed}, got {args.memory_format!r}")
    return Conditions(
        device=args.device,
        dtype=args.dtype,
        memory_format=args.memory_format,
        project=args.project,
        threads=args.threads or torch.get_num_threads(),
        seed=args.seed,
        image=args.image,
    )


def need_extra(what: str) -> None:
    """Raise UsageError unless the packages of the extra `bench` are installed."""
    missing = [name for name in ("rich", "matplotlib", "PIL") if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}: pip install 'fullattn[bench]'")


def modes_named(chosen: str | None) -> tuple[Mode, ...]:
    """Return the mode of that name, or both for None and "both"."""
    return tuple(mode for mode in MODES if mode == chosen) or MODES


def console() -> Console:
    """Make a console that is wide enough for the tables."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal or console.width < WIDTH:
        console = Console(width=WIDTH)
    return console
