"""Arithmetic on sizes that are integers or symbols, so that one formula serves Python and a page.

The formulas of costs and workspaces are written with +, -, *, // and the functions below. Given
integers they give integers. Given symbols they give an `Expression`: a graph of terms, which is
data that any small evaluator can compute, such as the one of the documentation's cost explorer.
A comparison of symbols is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, Union

__all__ = [
    "Expression",
    "Size",
    "at_least",
    "ceil_div",
    "equal",
    "graph",
    "less",
    "maximum",
    "minimum",
    "where",
]

_OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "<": lambda a, b: int(a < b),
    "==": lambda a, b: int(a == b),
    "max": max,
    "min": min,
    "where": lambda condition, a, b: a if condition else b,
}


class Expression:
    """A symbol, or an operation on symbols and integers.

    Args:
        operation: a name of the operations of this module, or "symbol".
        arguments: its operands; of a symbol its name.

    Example:
        >>> height, width = Expression("symbol", "height"), Expression("symbol", "width")
        >>> area = maximum(height * width, 12)
        >>> area.evaluate({"height": 3, "width": 5}), area.evaluate({"height": 3, "width": 2})
        (15, 12)
    """

    __slots__ = ("arguments", "operation")

    def __init__(self, operation: str, *arguments: Size | str) -> None:
        self.operation = operation
        self.arguments = arguments

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The value for values of the symbols.

        Args:
            values: for the name of each symbol its value.

        Returns:
            The value.
        """
        nodes, (at,) = graph([self])
        found: list[int] = []
        for node in nodes:
            if isinstance(node, list):
                found.append(_OPERATIONS[node[0]](*(found[each] for each in node[1:])))  # type: ignore[operator]
            else:
                found.append(values[node] if isinstance(node, str) else node)
        return found[at]

    def __add__(self, other: Size) -> Size:
        return _made("+", self, other)

    def __radd__(self, other: Size) -> Size:
        return _made("+", other, self)

    def __sub__(self, other: Size) -> Size:
        return _made("-", self, other)

    def __rsub__(self, other: Size) -> Size:
        return _made("-", other, self)

    def __mul__(self, other: Size) -> Size:
        return _made("*", self, other)

    def __rmul__(self, other: Size) -> Size:
        return _made("*", other, self)

    def __floordiv__(self, other: Size) -> Size:
        return _made("//", self, other)

    def __rfloordiv__(self, other: Size) -> Size:
        return _made("//", other, self)

    def __bool__(self) -> bool:
        raise TypeError("a symbol has no truth value; use `where`")


Size: TypeAlias = Union[int, Expression]  # noqa: UP007 - an alias that is evaluated


def _made(operation: str, *arguments: Size) -> Size:
    """The operation, simplified where an operand is the neutral or the absorbing element."""
    if not any(isinstance(each, Expression) for each in arguments):
        result: int = _OPERATIONS[operation](*arguments)  # type: ignore[operator]
        return result
    first, last = arguments[0], arguments[-1]
    if operation in ("+", "-") and last == 0 and not isinstance(last, Expression):
        return first
    if operation == "+" and first == 0 and not isinstance(first, Expression):
        return last
    if operation == "*":
        for one, other in ((first, last), (last, first)):
            if isinstance(one, int) and one in (0, 1):
                return other if one else 0
    return Expression(operation, *arguments)


def _folded(operation: str, sizes: tuple[Size, ...]) -> Size:
    if not any(isinstance(size, Expression) for size in sizes):
        result: int = _OPERATIONS[operation](sizes)  # type: ignore[operator]
        return result
    first, *others = sizes
    for size in others:
        first = _made(operation, first, size)
    return first


def maximum(*sizes: Size) -> Size:
    """The largest of sizes."""
    return _folded("max", sizes)


def minimum(*sizes: Size) -> Size:
    """The smallest of sizes."""
    return _folded("min", sizes)


def ceil_div(dividend: Size, divisor: Size) -> Size:
    """The quotient of two sizes, rounded up."""
    return (dividend + divisor - 1) // divisor


def less(one: Size, other: Size) -> Size:
    """1 where one size is smaller than the other, 0 elsewhere."""
    if isinstance(one, int) and isinstance(other, int):
        return int(one < other)
    return _made("<", one, other)


def at_least(one: Size, other: Size) -> Size:
    """1 where one size is not smaller than the other, 0 elsewhere."""
    return 1 - less(one, other)


def equal(one: Size, other: Size) -> Size:
    """1 where two sizes are equal, 0 elsewhere."""
    return _made("==", one, other)


def where(condition: Size, then: Size, otherwise: Size) -> Size:
    """One size where a condition is not 0, another where it is."""
    if isinstance(condition, int):
        return then if condition else otherwise
    return _made("where", condition, then, otherwise)


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
    nodes: list[Any] = []
    places: dict[Any, int] = {}
    seen: dict[int, int] = {}

    def place(size: Any) -> int:
        if isinstance(size, Expression) and id(size) in seen:
            return seen[id(size)]
        node: Any = size
        if isinstance(size, Expression):
            if size.operation == "symbol":
                node = size.arguments[0]
            else:
                node = [size.operation, *map(place, size.arguments)]
        key = tuple(node) if isinstance(node, list) else node
        if key not in places:
            places[key] = len(nodes)
            nodes.append(node)
        if isinstance(size, Expression):
            seen[id(size)] = places[key]
        return places[key]

    sizes = list(sizes)
    return nodes, [place(size) for size in sizes]
