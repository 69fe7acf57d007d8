"""What the commands of the command line share: a parser of one-sentence errors, kinds of values."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

__all__ = ["Adds", "Parser", "count", "seconds", "seed", "setting", "words"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and end with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


# A parser, or a group of its arguments.
Adds: TypeAlias = argparse.ArgumentParser | argparse._ArgumentGroup


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number that a generator of random numbers takes."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A finite time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def words(values: Sequence[str]) -> list[str]:
    """Values given one by one or with commas between them."""
    return [word for value in values for word in value.split(",") if word]


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a Python literal or, where it is none, text."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value
