"""What was done to a model: plain data that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fullattn.swap.shapes import count_flops
from fullattn.swap.targets import Place

__all__ = ["Change", "Report"]


@dataclass(eq=False)
class Change:
    """One layer that came into a model.

    Attributes:
        place: where in the model, and the module that was there before.
        now: the module that is there now: the layer, or the layer and what it needed around it.
        layer: the new layer itself.
        inserted: whether the layer stands behind the module of before, not in its place.
        in_channels: channels of the feature map that comes in.
        out_channels: channels of the one that goes out.
        input: shape of the feature map that comes in, (B, C, H, W), at which FLOPs are counted:
            that of the sample input, or of a trial.
        adapter: the 1×1 convolution from in_channels to out_channels; None where they are equal.
        hooks: hooks of the replaced module and of those within it, in words: they are gone with it.
    """

    place: Place
    now: nn.Module
    layer: nn.Module
    inserted: bool
    in_channels: int
    out_channels: int
    input: tuple[int, ...]
    adapter: nn.Module | None = None
    hooks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Dotted name in the model; the first one where the module is shared."""
        return self.place.name

    @property
    def names(self) -> tuple[str, ...]:
        """All dotted names of the module."""
        return self.place.names

    @property
    def was(self) -> nn.Module:
        """The module of before."""
        return self.place.module

    @property
    def parameters_before(self) -> int:
        """Numbers in the replaced module's parameters; 0 where the layer was inserted."""
        return 0 if self.inserted else _parameters(self.was)

    @property
    def parameters_after(self) -> int:
        """Numbers in the parameters of what came."""
        return _parameters(self.layer if self.inserted else self.now)

    @property
    def flops_before(self) -> int | None:
        """FLOPs of the replaced module at `input`; 0 where the layer was inserted."""
        return 0 if self.inserted else count_flops(self.was, self.input)

    @property
    def flops_after(self) -> int | None:
        """FLOPs at `input` of what came; None where they cannot be counted."""
        return count_flops(self.layer if self.inserted else self.now, self.input)


@dataclass(eq=False, repr=False)
class Report:
    """What `swap` or `insert` did. Shows as a table; `remove` takes the changes back.

    FLOPs are 2 for each multiplication with an addition, in a forward pass of one place at the
    shape that the table gives; they are counted when they are asked for.

    Attributes:
        action: "swap" or "insert".
        changes: one for each place.
        parameters_before: numbers in the model's parameters before.
        parameters_after: the same afterwards.
        removed: whether `remove` has put the original modules back.
    """

    action: Literal["swap", "insert"]
    changes: tuple[Change, ...]
    parameters_before: int
    parameters_after: int
    removed: bool = False

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The new layers, in the order of `changes`."""
        return tuple(change.layer for change in self.changes)

    @property
    def flops_before(self) -> int | None:
        """FLOPs of all replaced modules together; None where one of them cannot be counted."""
        return _sum(change.flops_before for change in self.changes)

    @property
    def flops_after(self) -> int | None:
        """FLOPs of all that came; None where one of them cannot be counted."""
        return _sum(change.flops_after for change in self.changes)

    def __repr__(self) -> str:
        rows = [
            ("", "was", "now", "channels", "parameters", "FLOPs", "at"),
            *map(_row, self.changes),
        ]
        total = f"{_short(self.parameters_before)} → {_short(self.parameters_after)}"
        rows.append(("the model", "", "", "", total, "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> list[str]:
        notes = []
        for change in self.changes:
            if change.adapter is not None:
                notes.append(
                    f"{change.name}: a 1×1 convolution takes {change.in_channels} channels to "
                    f"{change.out_channels} first"
                )
            if len(change.names) > 1:
                notes.append(
                    f"{change.name} is also {', '.join(change.names[1:])}: shared as before"
                )
            notes += [f"{change.name}: no longer called: {hook}" for hook in change.hooks]
        if self.removed:
            notes.append("removed: the original modules are back")
        return notes


def _row(change: Change) -> tuple[str, ...]:
    channels = f"{change.in_channels}"
    if change.out_channels != change.in_channels:
        channels += f" → {change.out_channels}"
    name = type(change.layer).__name__
    if change.adapter is not None:
        name = f"1×1, {name}"
    was = type(change.was).__name__
    return (
        change.name + (f" (+{len(change.names) - 1})" if len(change.names) > 1 else ""),
        was,
        f"{was}, {name}" if change.inserted else name,
        channels,
        f"{_short(change.parameters_before)} → {_short(change.parameters_after)}",
        f"{_short(change.flops_before)} → {_short(change.flops_after)}",
        "×".join(map(str, change.input)),
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = list(numbers)
    return None if None in known else sum(number or 0 for number in known)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _short(number: int | None) -> str:
    if number is None:
        return "–"
    for factor, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "K")):
        if number >= factor:
            return f"{number / factor:#.3g}".rstrip(".") + letter
    return str(number)
