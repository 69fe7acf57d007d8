"""Reports of changes to a model: they print as a table and save to a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fullattn._text import si
from fullattn.swap import recorded
from fullattn.swap.inserted import Insertion
from fullattn.swap.shapes import count_flops
from fullattn.swap.targets import Site

__all__ = ["Change", "Report", "columns", "count_parameters", "notes"]


@dataclass(eq=False)
class Change:
    """One layer that was put into a model.

    Attributes:
        site: where in the model, and the module that was there before.
        new: the module that is there now: the layer, a module that contains it, or after an
            insertion the old module.
        layer: the new layer itself.
        in_channels: channels of the input.
        out_channels: channels of the output.
        input: shape (B, C, H, W) of the input at which FLOPs are counted: with the sample input,
            or of a trial size.
        adapter: the 1×1 convolution from in_channels to out_channels; None if they are equal.
        hooks: descriptions of the old module's hooks, which are no longer called.
        insertion: how the layer follows the old module; None if it replaces it.
        parameter_shapes: digest of the parameters' shapes of the old module.
    """

    site: Site
    new: nn.Module
    layer: nn.Module
    in_channels: int
    out_channels: int
    input: tuple[int, ...]
    adapter: nn.Module | None = None
    hooks: tuple[str, ...] = ()
    insertion: Insertion | None = None
    parameter_shapes: str = ""

    @property
    def name(self) -> str:
        """Dotted name in the model; the first one if the module is shared."""
        return self.site.name

    @property
    def names(self) -> tuple[str, ...]:
        """All dotted names of the module."""
        return self.site.names

    @property
    def layer_name(self) -> str:
        """Dotted name of the new layer in the model."""
        if self.insertion is not None:
            return ".".join((self.name, *self.insertion.path))
        return self.name if self.adapter is None else f"{self.name}.layer"

    @property
    def old(self) -> nn.Module:
        """The module that was there before."""
        return self.site.module

    @property
    def parameters_before(self) -> int:
        """Number of parameters of the replaced module; 0 if the layer was inserted."""
        return count_parameters(self.old) if self.insertion is None else 0

    @property
    def parameters_after(self) -> int:
        """Number of parameters that were added."""
        return count_parameters(self._added)

    @property
    def flops_before(self) -> int | None:
        """FLOPs of the replaced module; 0 if the layer was inserted, None if unknown."""
        return count_flops(self.old, self.input) if self.insertion is None else 0

    @property
    def flops_after(self) -> int | None:
        """FLOPs of the modules that were added; None if unknown."""
        return count_flops(self._added, self.input)

    def make(self) -> None:
        """Put the layer into the model."""
        if self.insertion is None:
            self.site.set(self.new)
        else:
            self.insertion.attach()

    def undo(self) -> None:
        """Take the layer out of the model."""
        if self.insertion is None:
            self.site.set(self.old)
        else:
            self.insertion.detach()

    @property
    def _added(self) -> nn.Module:
        return self.new if self.insertion is None else self.layer


@dataclass(eq=False, repr=False)
class Report:
    """The result of `swap` or `insert`. Prints as a table; `remove` undoes its changes.

    FLOPs are 2 per multiply-accumulate, of one forward call at the shape in the table. They are
    counted on access.

    Attributes:
        action: "swap" or "insert".
        model: the model.
        replacement: what the layers were built with.
        options: keyword arguments of the replacement.
        architecture: of the model before, to recognise it when the change is made again.
        changes: one for each module that the target matched.
        parameters_before: number of parameters of the model before.
        parameters_after: number of parameters of the model after.
        removed: whether `remove` has undone the changes.
        kept: the record of the changes in the description of a network that its framework builds
            again; None in other networks.
    """

    action: Literal["swap", "insert"]
    model: nn.Module
    replacement: Callable[..., nn.Module]
    options: Mapping[str, Any]
    architecture: Mapping[str, Any]
    changes: tuple[Change, ...]
    parameters_before: int
    parameters_after: int
    removed: bool = False
    kept: dict[str, Any] | None = None

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

    def to_dict(self) -> dict[str, Any]:
        """Describe the changes as JSON values, for `fullattn.replay`.

        Raises:
            ValueError: the layer is no class that can be imported, or an option is neither a JSON
                value nor a module class.
        """
        return recorded.record(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the changes to a JSON file, for `fullattn.replay`.

        Args:
            path: place of the file; an earlier one is replaced.

        Raises:
            ValueError: as in `to_dict`; nothing is then written.
            OSError: the file cannot be written.
        """
        recorded.write(self, path)

    def __repr__(self) -> str:
        rows = [
            ("", "old", "new", "channels", "parameters", "FLOPs", "at"),
            *map(columns, self.changes),
            ("the model", *[""] * 3, _pair(self.parameters_before, self.parameters_after), "", ""),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.insert(1, "─" * (sum(widths) + 2 * (len(widths) - 1)))
        lines += [note for change in self.changes for note in notes(change)]
        if self.removed:
            lines.append("removed: the original modules are back")
        return "\n".join(lines)


def count_parameters(module: nn.Module) -> int:
    """Count the elements of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def columns(change: Change) -> tuple[str, ...]:
    """Format a change: where, old, new, channels, parameters, FLOPs and the shape they are at."""
    old, new = type(change.old).__name__, type(change.layer).__name__
    if change.insertion is not None:
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


def notes(change: Change) -> list[str]:
    """Say in sentences what the columns of a change do not."""
    found = []
    if change.adapter is not None:
        found.append(
            f"{change.name}: a 1×1 convolution from {change.in_channels} to "
            f"{change.out_channels} channels precedes the layer"
        )
    if len(change.names) > 1:
        found.append(f"{change.name} is shared: also {', '.join(change.names[1:])}")
    return found + [f"{change.name}: no longer called: {hook}" for hook in change.hooks]


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def _pair(before: int | None, after: int | None) -> str:
    return f"{si(before)} → {si(after)}"
