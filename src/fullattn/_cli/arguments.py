"""Arguments that several commands take: types of values, and groups of options."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

from fullattn._cli.errors import UsageError
from fullattn._text import installing

__all__ = [
    "CHANNEL",
    "DTYPES",
    "FILE",
    "FOLDER",
    "LAYER_HELP",
    "LAYER_NAMES",
    "MEMORY_FORMATS",
    "POINT",
    "SIZE",
    "Adds",
    "Formatter",
    "Parser",
    "add_conditions",
    "add_device",
    "add_inputs",
    "add_passes",
    "add_repetition",
    "count",
    "index",
    "need_packages",
    "number",
    "point",
    "seconds",
    "seed",
    "setting",
    "size",
    "words",
]

DTYPES = ("float32", "float64", "float16", "bfloat16")
MEMORY_FORMATS = ("contiguous", "channels_last")
# Those of `fullattn.layers.LAYERS`, which needs PyTorch.
LAYER_NAMES = ("fully", "channel", "spatial")
LAYER_HELP = f"{', '.join(LAYER_NAMES)}, or FILE.py:CLASS of a layer that is registered there"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


class Formatter(argparse.HelpFormatter):
    """Wrap a description, and leave the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


T = TypeVar("T")
# A parser, or a group of its arguments.
Adds: TypeAlias = argparse.ArgumentParser | argparse._ArgumentGroup


def _value(
    convert: Callable[[str], T], expected: str, holds: Callable[[T], bool]
) -> Callable[[str], T]:
    """Make the type of an argument: what `convert` reads, if that `holds`."""

    def parse(text: str) -> T:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    parse.__doc__ = f"Parse {expected}."
    return parse


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError
    return int(text)


def _pair(text: str, separator: str) -> tuple[int, int]:
    first, second = map(_whole, text.split(separator))
    return first, second


count = _value(_whole, "a whole number of at least 1", lambda value: value >= 1)
index = _value(_whole, "a whole number from 0", lambda value: True)
seed = _value(_whole, "a whole number from 0", lambda value: value < 2**63)
seconds = _value(float, "seconds above 0", lambda value: 0 < value < math.inf)
number = _value(float, "a number", math.isfinite)
size = _value(partial(_pair, separator="x"), "HxW such as 512x1024", lambda pair: True)
point = _value(partial(_pair, separator=","), "X,Y such as 320,240", lambda pair: True)


def words(values: Iterable[str]) -> list[str]:
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


def add_device(parser: Adds) -> None:
    """Add --device."""
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (cpu)"
    )


def add_conditions(parser: Adds) -> None:
    """Add --dtype and --device."""
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="(float32)")
    add_device(parser)


def add_inputs(parser: Adds) -> None:
    """Add --memory-format, --seed and --threads."""
    parser.add_argument(
        "--memory-format", default="contiguous", choices=MEMORY_FORMATS, help="(contiguous)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of parameters and inputs (0)")
    parser.add_argument("--threads", type=count, help="PyTorch's threads (PyTorch's own choice)")


def add_repetition(parser: Adds, *, limit: float, budget: float, when: str = "") -> None:
    """Add --seconds, --repeats, --limit, --budget and --no-memory.

    Args:
        parser: to add to.
        limit: default of --limit.
        budget: default of --budget, which the command sets if it has a condition.
        when: the condition.
    """
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=2.0,
        help="to spend on timing one implementation at one shape in one mode; 3 to 20 calls (2)",
    )
    parser.add_argument("--repeats", type=count, help="time exactly so many calls of each instead")
    parser.add_argument(
        "--limit",
        type=seconds,
        default=limit,
        help=f"leave out what takes more seconds than this in one call ({limit:g})",
    )
    parser.add_argument(
        "--budget",
        type=seconds,
        default=None if when else budget,
        help="seconds for the whole run; what does not fit is timed less often or left out "
        f"({budget:g}{when})",
    )
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="do not measure peak memory; saves one process and one call for every figure, and the "
        "check that a row fits into memory before it is timed",
    )


def need_packages(what: str, extra: str, *names: str) -> None:
    """Raise UsageError unless packages are installed, naming the extra that holds them."""
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}: {installing(extra)}")


# Kinds of values that several options take.
FILE: Any = {"type": Path, "metavar": "FILE"}
FOLDER: Any = {"type": Path, "metavar": "DIR"}
POINT: Any = {"type": point, "metavar": "X,Y"}
CHANNEL: Any = {"type": index, "metavar": "C"}
SIZE: Any = {"type": size, "metavar": "HxW"}


def add_passes(parser: Parser) -> None:
    """Add --scales, --flip, --window and --stride."""
    add = parser.add_argument_group("segmentation").add_argument
    scales = "average over images scaled by these factors (1)"
    add("--scales", nargs="+", type=number, default=[1.0], metavar="SCALE", help=scales)
    add("--flip", action="store_true", help="average over images and their mirror images")
    add("--window", **SIZE, help="size in pixels of a sliding window")
    add("--stride", **SIZE, help="step of the window (two thirds of it)")
