"""Arithmetic on sizes that are integers or symbols, so that one formula serves Python and a page.

The formulas of costs and workspaces are written with +, -, *, // and the functions below. Given
integers they give integers. Given symbols they give an `Expression`: a graph of terms, which is
data that any small evaluator can compute, such as the one of the documentation's cost explorer.
A comparison is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias, Union

__all__ = [
    "Expression",
    "Size",
    "at_least",
    "equal",
    "graph",
    "less",
    "maximum",
    "minimum",
    "where",
]


class Expression:
    """A symbol, or an operation on symbols and integers.

    Args:
        operation: "symbol", or one of + - * // < == max min where.
        arguments: its operands; of a symbol its name.

    Example:
        >>> height = Expression("symbol", "height")
        >>> graph([maximum(height * 2, 12)])
        (['height', 2, ['*', 0, 1], 12, ['max', 2, 3]], [4])
    """

    __slots__ = ("arguments", "operation")

    def __init__(self, operation: str, *arguments: Size | str) -> None:
        self.operation = operation
        self.arguments = arguments

    def __add__(self, other: Size) -> Size:
        return self if _is(other, 0) else Expression("+", self, other)

    __radd__ = __add__

    def __sub__(self, other: Size) -> Size:
        return self if _is(other, 0) else Expression("-", self, other)

    def __rsub__(self, other: Size) -> Size:
        return Expression("-", other, self)

    def __neg__(self) -> Size:
        return Expression("-", 0, self)

    def __mul__(self, other: Size) -> Size:
        if _is(other, 0):
            return 0
        return self if _is(other, 1) else Expression("*", self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        return Expression("//", self, other)

    def __rfloordiv__(self, other: Size) -> Size:
        return Expression("//", other, self)

    def __bool__(self) -> bool:
        raise TypeError("a symbol has no truth value; use `where`")


Size: TypeAlias = Union[int, Expression]  # noqa: UP007 - an alias that is evaluated


def _is(size: Size, number: int) -> bool:
    return isinstance(size, int) and size == number


def _folded(operation: str, sizes: tuple[Size, ...]) -> Size:
    first, *others = sizes
    for size in others:
        first = Expression(operation, first, size)
    return first


def maximum(*sizes: Size) -> Size:
    """Return the largest of sizes."""
    return _folded("max", sizes) if Expression in map(type, sizes) else max(sizes)  # type: ignore[type-var]


def minimum(*sizes: Size) -> Size:
    """Return the smallest of sizes."""
    return _folded("min", sizes) if Expression in map(type, sizes) else min(sizes)  # type: ignore[type-var]


def less(one: Size, other: Size) -> Size:
    """1 where one size is smaller than the other, 0 elsewhere."""
    if isinstance(one, int) and isinstance(other, int):
        return int(one < other)
    return Expression("<", one, other)


def at_least(one: Size, other: Size) -> Size:
    """1 where one size is not smaller than the other, 0 elsewhere."""
    return 1 - less(one, other)


def equal(one: Size, other: Size) -> Size:
    """1 where two sizes are equal, 0 elsewhere."""
    if isinstance(one, int) and isinstance(other, int):
        return int(one == other)
    return Expression("==", one, other)


def where(condition: Size, then: Size, otherwise: Size) -> Size:
    """One size where a condition is not 0, another where it is."""
    if isinstance(condition, int):
        return then if condition else otherwise
    return Expression("where", condition, then, otherwise)


def graph(sizes: Iterable[Size]) -> tuple[list[Any], list[int]]:
    """Sizes as data.

    Args:
        sizes: that share terms or do not.

    Returns:
        The terms, each an integer, the name of a symbol, or a list of an operation and the places
        of its operands among the terms before it; and the place of each size.

    Example:
        >>> graph([Expression("symbol", "height") * 2 + 1, 7])
        (['height', 2, ['*', 0, 1], 1, ['+', 2, 3], 7], [4, 5])
    """
    terms: list[Any] = []
    places: dict[Any, int] = {}

    def place(size: Any) -> int:
        if isinstance(size, Expression) and size in places:
            return places[size]
        term: Any = size
        if isinstance(size, Expression):
            symbol = size.operation == "symbol"
            term = size.arguments[0] if symbol else (size.operation, *map(place, size.arguments))
        if term not in places:
            places[term] = len(terms)
            terms.append(list(term) if isinstance(term, tuple) else term)
        places[size] = places[term]
        return places[term]

    found = [place(size) for size in sizes]
    return terms, found
