"""Regroup the axes of a feature map for attention, and back.

A `Cut` turns a feature map of shape (B, C, H, W) into the layout (B, S, N, D) that
`fullattn.attention` works on (S independent slices of N tokens with D features), and back. Both
directions are views where the strides allow it; nothing is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["CHANNELS", "COLUMNS", "POSITIONS", "ROWS", "Cut"]

_AXES = "chw"


@dataclass(frozen=True)
class Cut:
    """A way to cut a feature map (B, C, H, W) into slices of tokens with features.

    Attributes:
        name: for figures of similarity maps, such as "columns".
        slices: the axes, out of c, h and w, along which the slices are independent; "" for one
            slice.
        tokens: the axes whose elements are compared with each other.
        features: the axes that a score sums over.

    Raises:
        ValueError: the three do not name each of c, h and w once.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 3, 4, 5)
        >>> COLUMNS(x).shape, ROWS(x).shape, CHANNELS(x).shape, POSITIONS(x).shape
        (torch.Size([2, 5, 3, 4]), torch.Size([2, 4, 3, 5]), torch.Size([2, 1, 3, 20]), \
torch.Size([2, 1, 20, 3]))
        >>> within_rows = Cut("positions of a row", slices="h", tokens="w", features="c")
        >>> within_rows.inverse(within_rows(x), 4, 5).shape
        torch.Size([2, 3, 4, 5])
    """

    name: str
    slices: str
    tokens: str
    features: str

    # Computed once; torch.compile does not trace a cached property.
    _axes: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    _single: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _order: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _inverse_order: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _channels: tuple[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if sorted(self.slices + self.tokens + self.features) != list(_AXES):
            raise ValueError(
                f"a cut names each of the axes c, h and w once, got slices={self.slices!r}, "
                f"tokens={self.tokens!r}, features={self.features!r}"
            )
        groups = (self.slices, self.tokens, self.features)
        axes = tuple(tuple(1 + _AXES.index(axis) for axis in group) for group in groups)
        order = (0, *(axis for group in axes for axis in group))
        ((at, merged),) = ((at, group) for at, group in enumerate(axes, start=1) if 1 in group)
        found = {
            "_axes": axes,
            # The three axes if each group has one, otherwise empty.
            "_single": order[1:] if all(map(len, axes)) else (),
            "_order": order,
            "_inverse_order": tuple(order.index(axis) for axis in range(4)),
            # The axis of (B, S, N, D) with the channels, and the axes merged with them.
            "_channels": (at, tuple(axis for axis in merged if axis != 1)),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def __call__(self, x: Tensor) -> Tensor:
        """Cut a feature map.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, S, N, D).
        """
        cut = x.permute(self._order)
        return cut if self._single else cut.reshape(x.shape[0], *self.sizes(x.shape))

    def inverse(self, slices: Tensor, height: int, width: int) -> Tensor:
        """Put slices back into a feature map.

        Args:
            slices: (B, S, N, D).
            height: H.
            width: W.

        Returns:
            (B, C, H, W).
        """
        if self._single:
            return slices.permute(self._inverse_order)
        at, others = self._channels
        lengths = (0, slices.shape[at], height, width)
        if others:
            merged = math.prod(lengths[axis] for axis in others)
            lengths = (0, slices.shape[at] // merged, height, width)
        if not self.slices:
            # In two steps: reshaping 1 next to H adds a guard 1 % H, which a strict export with
            # symbolic sizes cannot prove if H is a quotient of an image's height.
            slices = slices.squeeze(1)
        axes = [lengths[axis] for axis in self._order[1:]]
        return slices.reshape(slices.shape[0], *axes).permute(self._inverse_order)

    def sizes(self, shape: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Compute the numbers of slices, tokens and features of a feature map.

        Args:
            shape: (B, C, H, W), of integers or symbols.

        Returns:
            S, N and D.
        """
        slices, tokens, features = (
            math.prod([shape[axis] for axis in group]) for group in self._axes
        )
        return slices, tokens, features


COLUMNS = Cut("columns", slices="w", tokens="c", features="h")
ROWS = Cut("rows", slices="h", tokens="c", features="w")
CHANNELS = Cut("channels", slices="", tokens="c", features="hw")
POSITIONS = Cut("positions", slices="", tokens="hw", features="c")
