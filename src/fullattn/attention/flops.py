"""FLOPs of attention by formula: 2 for each multiplication with an addition, products alone.

The formulas take the shapes of an operator's arguments, so that PyTorch's FLOP counter and
`fullattn.costs` share one statement of each. A softmax counts nothing, as in PyTorch's counter.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

__all__ = [
    "attend",
    "attend_backward",
    "axial_channel_attention",
    "axial_channel_attention_backward",
    "register",
    "registered",
]

Shape = Sequence[Any]


def attend(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> Any:
    """Count scores and attended values: 2 · B·S·N·M · (D + E).

    The shapes are (B, S, N, D), (B, S or 1, M, D) and (B, S or 1, M, E).

    Example:
        >>> attend((1, 97, 512, 97), (1, 1, 512, 97), (1, 97, 512, 97))  # columns of 512x97x97
        9866051584
    """
    *slices, tokens, features = query
    return 2 * prod(slices) * tokens * key[-2] * (features + value[-1])


def attend_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> Any:
    """Count the backward pass of a backend that does not keep its map: 2 · B·S·N·M · (3D + 2E).

    These are the scores again, and the gradients of weights, query, key and value.

    Example:
        >>> columns, shared = (1, 97, 512, 97), (1, 1, 512, 97)
        >>> attend_backward(columns, columns, shared, columns) / attend(columns, shared, columns)
        2.5
    """
    *slices, tokens, features = query
    return 2 * prod(slices) * tokens * key[-2] * (3 * features + 2 * value[-1])


def axial_channel_attention(x: Shape, *_: Any, **__: Any) -> Any:
    """Count two products in each of two branches: 8 · B·C·C·H·W.

    Example:
        >>> axial_channel_attention((1, 512, 97, 97))
        19732103168
    """
    return 8 * prod(x) * x[1]


def axial_channel_attention_backward(grad: Shape, x: Shape, *_: Any, **__: Any) -> Any:
    """Count five products in each of two branches, the scores among them: 20 · B·C·C·H·W.

    Example:
        >>> axial_channel_attention_backward((1, 512, 97, 97), (1, 512, 97, 97))
        49330257920
    """
    return 20 * prod(x) * x[1]


_COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Register a FLOP formula for an operator with PyTorch's counter, unless it has one.

    Importing the counter imports Triton where that is installed, which takes longer than all of
    `import fullattn`; so the formula waits until the program itself imports the counter.
    """
    _formulas[operator] = formula
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])


def registered() -> dict[Any, Callable[..., int]]:
    """Return the formulas of all operators that `register` was called with."""
    return dict(_formulas)


def _hand_over(counter: ModuleType) -> None:
    for operator, formula in _formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)


class _CounterImport:
    """Finder that sees the counter being imported, and hands over the formulas after that."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_hand_over(module: ModuleType) -> None:
                execute(module)
                _hand_over(module)

            spec.loader.exec_module = execute_and_hand_over  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _CounterImport())
