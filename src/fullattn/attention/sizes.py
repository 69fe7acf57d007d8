"""Arithmetic on sizes that are integers or symbols, so that one formula serves Python and a page.

The formulas of costs and workspaces use +, -, *, // and the functions below. On integers they
return integers. On symbols they return an `Expression`, which the documentation's cost explorer
writes as data and evaluates in JavaScript. A comparison returns 0 or 1.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import TypeAlias, Union

__all__ = [
    "Expression",
    "Size",
    "at_least",
    "equal",
    "less",
    "maximum",
    "minimum",
    "where",
]


class Expression:
    """A symbol, or an operation on symbols and integers.

    Args:
        operation: "symbol", or one of + - * // < == max min where.
        arguments: the operands, or the name of the symbol.
    """

    __slots__ = ("arguments", "operation")

    def __init__(self, operation: str, *arguments: Size | str) -> None:
        self.operation: str = operation
        self.arguments: tuple[Size | str, ...] = arguments

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


def maximum(*sizes: Size) -> Size:
    """Return the largest size."""
    if Expression in [type(size) for size in sizes]:
        return reduce(partial(Expression, "max"), sizes)
    return max(sizes)  # type: ignore[type-var]


def minimum(*sizes: Size) -> Size:
    """Return the smallest size."""
    if Expression in [type(size) for size in sizes]:
        return reduce(partial(Expression, "min"), sizes)
    return min(sizes)  # type: ignore[type-var]


def less(one: Size, other: Size) -> Size:
    """Return 1 if one size is smaller than the other, else 0."""
    if isinstance(one, int) and isinstance(other, int):
        return int(one < other)
    return Expression("<", one, other)


def at_least(one: Size, other: Size) -> Size:
    """Return 1 if one size is at least the other, else 0."""
    return 1 - less(one, other)


def equal(one: Size, other: Size) -> Size:
    """Return 1 if two sizes are equal, else 0."""
    if isinstance(one, int) and isinstance(other, int):
        return int(one == other)
    return Expression("==", one, other)


def where(condition: Size, then: Size, otherwise: Size) -> Size:
    """Return `then` if a condition is not 0, else `otherwise`."""
    if isinstance(condition, int):
        return then if condition else otherwise
    return Expression("where", condition, then, otherwise)
