"""Reports of changes to a model: plain data that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fullattn._text import si
from fullattn.swap.shapes import count_flops
from fullattn.swap.targets import Site

__all__ = ["Change", "Report", "count_parameters"]


@dataclass(eq=False)
class Change:
    """One layer that was put into a model.

    Attributes:
        site: where in the model, and the module that was there before.
        new: the module that is there now: the layer, or a module that contains it.
        layer: the new layer itself.
        inserted: whether the layer follows the old module instead of replacing it.
        in_channels: channels of the input.
        out_channels: channels of the output.
        input: shape (B, C, H, W) of the input at which FLOPs are counted: with the sample input,
            or of a trial size.
        adapter: the 1×1 convolution from in_channels to out_channels; None if they are equal.
        hooks: descriptions of the old module's hooks, which are no longer called.
    """

    site: Site
    new: nn.Module
    layer: nn.Module
    inserted: bool
    in_channels: int
    out_channels: int
    input: tuple[int, ...]
    adapter: nn.Module | None = None
    hooks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Dotted name in the model; the first one if the module is shared."""
        return self.site.name

    @property
    def names(self) -> tuple[str, ...]:
        """All dotted names of the module."""
        return self.site.names

    @property
    def old(self) -> nn.Module:
        """The module that was there before."""
        return self.site.module

    @property
    def parameters_before(self) -> int:
        """Number of parameters of the replaced module; 0 if the layer was inserted."""
        return 0 if self.inserted else count_parameters(self.old)

    @property
    def parameters_after(self) -> int:
        """Number of parameters that were added."""
        return count_parameters(self._added)

    @property
    def flops_before(self) -> int | None:
        """FLOPs of the replaced module; 0 if the layer was inserted, None if unknown."""
        return 0 if self.inserted else count_flops(self.old, self.input)

    @property
    def flops_after(self) -> int | None:
        """FLOPs of the modules that were added; None if unknown."""
        return count_flops(self._added, self.input)

    @property
    def _added(self) -> nn.Module:
        return self.layer if self.inserted else self.new


@dataclass(eq=False, repr=False)
class Report:
    """The result of `swap` or `insert`. Prints as a table; `remove` undoes its changes.

    FLOPs are 2 per multiply-accumulate, of one forward call at the shape in the table. They are
    counted on access.

    Attributes:
        action: "swap" or "insert".
        changes: one for each module that the target matched.
        parameters_before: number of parameters of the model before.
        parameters_after: number of parameters of the model after.
        removed: whether `remove` has undone the changes.
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
        """FLOPs of all replaced modules; None if one of them is unknown."""
        return _sum(change.flops_before for change in self.changes)

    @property
    def flops_after(self) -> int | None:
        """FLOPs of all modules that were added; None if one of them is unknown."""
        return _sum(change.flops_after for change in self.changes)

    def __repr__(self) -> str:
        rows = [
            ("", "old", "new", "channels", "parameters", "FLOPs", "at"),
            *map(_row, self.changes),
            ("the model", *[""] * 3, _pair(self.parameters_before, self.parameters_after), "", ""),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
        for change in self.changes:
            if change.adapter is not None:
                lines.append(
                    f"{change.name}: a 1×1 convolution from {change.in_channels} to "
                    f"{change.out_channels} channels precedes the layer"
                )
            if len(change.names) > 1:
                lines.append(f"{change.name} is shared: also {', '.join(change.names[1:])}")
            lines += [f"{change.name}: no longer called: {hook}" for hook in change.hooks]
        if self.removed:
            lines.append("removed: the original modules are back")
        return "\n".join(lines)


def count_parameters(module: nn.Module) -> int:
    """Count the elements of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _row(change: Change) -> tuple[str, ...]:
    old, new = type(change.old).__name__, type(change.layer).__name__
    if change.inserted:
        new = f"{old}, {new}"
    channels = str(change.in_channels)
    if change.adapter is not None:
        new = f"1×1, {new}"
        channels += f" → {change.out_channels}"
    others = len(change.names) - 1
    return (
        change.name + (f" (+{others})" if others else ""),
        old,
        new,
        channels,
        _pair(change.parameters_before, change.parameters_after),
        _pair(change.flops_before, change.flops_after),
        "×".join(map(str, change.input)),
    )


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def _pair(before: int | None, after: int | None) -> str:
    return f"{si(before)} → {si(after)}"
