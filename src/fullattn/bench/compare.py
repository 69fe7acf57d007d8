"""Differences between two runs beyond their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from fullattn._cli.conditions import MODES, Conditions, Mode
from fullattn._cli.errors import UsageError
from fullattn._text import digits
from fullattn.bench.results import Measurement, Results, Row
from fullattn.bench.verdict import relative_spread

__all__ = ["Difference", "check_comparable", "differences", "lost", "print_differences"]

# Noise: so many interquartile ranges, and at least this part of the whole.
_SPREADS = 2.0
_LEAST = 0.05
_LEAST_BYTES = 2**20


@dataclass(frozen=True)
class Difference:
    """A row in one mode in two runs.

    Attributes:
        row: the new row.
        mode: inference or training.
        old: the old measurement.
        new: the new one.
        machine: time of the baseline over that in the old run; 1 where the runs share no baseline.
        noise: how far `time` may be from 1 by chance; infinite where one of the times is of a
            single call.
    """

    row: Row
    mode: Mode
    old: Measurement
    new: Measurement
    machine: float
    noise: float

    @property
    def time(self) -> float:
        """New median over old, divided by that of the baseline."""
        return _ratio(self.old, self.new) / self.machine

    @property
    def slower(self) -> bool:
        """Whether it takes longer beyond the noise."""
        return self.time > 1 + self.noise

    @property
    def faster(self) -> bool:
        """Whether it takes less time beyond the noise."""
        return self.time < 1 / (1 + self.noise)

    @property
    def memory(self) -> float | None:
        """New peak over old, where both were measured."""
        old, new = self.old.peak_bytes, self.new.peak_bytes
        return new / old if old and new else None

    @property
    def memory_grew(self) -> bool:
        """Whether the peak grew by more than 5 % and by more than 1 MiB."""
        old, new = self.old.peak_bytes, self.new.peak_bytes
        return None not in (old, new) and new - old > max(_LEAST_BYTES, _LEAST * old)  # type: ignore[operator]

    @property
    def verdicts(self) -> str:
        """What became worse or better, in words for the table."""
        words = {
            "[red]slower[/red]": self.slower,
            "[green]faster[/green]": self.faster,
            "[red]more memory[/red]": self.memory_grew,
        }
        return ", ".join(word for word, holds in words.items() if holds)


def check_comparable(old: Conditions, new: Conditions) -> None:
    """Raise UsageError unless two runs are made under conditions that can be compared."""
    for what in ("device", "dtype", "memory_format", "project"):
        if getattr(old, what) != getattr(new, what):
            raise UsageError(
                f"expected an old run with {what} {getattr(new, what)} to compare with, "
                f"got {getattr(old, what)}"
            )
    if (old.image is None) != (new.image is None):
        raise UsageError(f"expected an old run with {new.input_kind}, got {old.input_kind}")


def _old_measurement(old: Results, row: Row, mode: Mode) -> Measurement | None:
    """Return the timed measurement of the same row in the old run, if there is one."""
    for each in old.at(row.shape):
        if (
            each.implementation.name == row.implementation.name
            and each.value("time", mode) is not None
        ):
            return each.measured[mode]
    return None


def _ratio(old: Measurement, new: Measurement) -> float:
    return (new.median_ms or 0.0) / (old.median_ms or 1.0)


def differences(old: Results, new: Results) -> list[Difference]:
    """Compare every row and mode that both runs have times for, except the baseline's own.

    Times are compared as ratios to the new run's baseline, taken from each run itself, so that a
    machine that is slower as a whole is no difference. Where the runs have no baseline in common
    they are compared in milliseconds.
    """
    found = []
    for row in new.rows:
        base = new.baseline_at(row.shape)
        for mode, now in row.measured.items():
            before = _old_measurement(old, row, mode)
            if row is base or before is None or not now.times_ms:
                continue
            machine, spreads = 1.0, [before, now]
            base_before = base and _old_measurement(old, base, mode)
            if base and base_before and base.value("time", mode) is not None:
                machine = _ratio(base_before, base.measured[mode])
                spreads += [base_before, base.measured[mode]]
            noise = max(_LEAST, _SPREADS * relative_spread(*spreads))
            found.append(Difference(row, mode, before, now, machine, noise))
    return found


def lost(old: Results, new: Results) -> list[tuple[Row, Mode]]:
    """List rows without a time in a mode in which the old run has one."""
    return [
        (row, mode)
        for row in new.rows
        for mode, now in row.measured.items()
        if not now.times_ms and _old_measurement(old, row, mode) is not None
    ]


def print_differences(old: Results, new: Results, console: Console) -> None:
    """Print what got slower or faster beyond the noise, and a sentence for the rest."""
    found = differences(old, new)
    console.print(f"\nCompared with the run of {old.environment.date}:", highlight=False)
    for mode in MODES:
        if shown := [each for each in found if each.verdicts and each.mode == mode]:
            console.print(_table(mode, shown))
    for row, mode in lost(old, new):
        console.print(
            f"{row.implementation.name} at {row.shape}, {mode}: had a time, has none any more."
        )
    slower, faster, grew = (
        sum(getattr(each, name) for each in found) for name in ("slower", "faster", "memory_grew")
    )
    lines = [
        f"{slower} of {len(found)} times slower beyond the noise, {faster} faster, {grew} peaks of "
        "memory grew.",
        f"Beyond the noise: more than {_SPREADS:g} interquartile ranges and {_LEAST:.0%}.",
    ]
    if unknown := sum(math.isinf(each.noise) for each in found):
        lines.append(f"{unknown} cannot be judged, for want of a second call.")
    if machines := sorted({each.machine for each in found} - {1.0}):
        lines.append(
            f"Times are taken over the baseline's, which itself took {machines[0]:.3g} to "
            f"{machines[-1]:.3g} times as long as in the old run."
        )
    else:
        lines.append("The runs have no baseline in common, so milliseconds are compared.")
    if not found:
        lines = [
            "The two runs have no row in common: no implementation at the same shape and mode."
        ]
    for label, a, b in (
        ("Device", old.environment.device_name, new.environment.device_name),
        ("PyTorch", old.environment.torch, new.environment.torch),
        ("fullattn", old.environment.fullattn, new.environment.fullattn),
        ("Threads", old.conditions.threads, new.conditions.threads),
    ):
        if a != b:
            lines.append(f"{label}: {a} then, {b} now.")
    for line in lines:
        console.print(line, style="dim", highlight=False, markup=False)


def _table(mode: Mode, shown: list[Difference]) -> Table:
    title = f"Differences: {mode}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("implementation", overflow="ellipsis")
    for heading in ("old\nms", "new\nms", "time\nover old", "noise", "memory\nover old"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for shape in dict.fromkeys(each.row.shape for each in shown):
        table.add_section()
        table.add_row(f"[bold]{shape}[/bold]")
        for each in shown:
            if each.row.shape != shape:
                continue
            table.add_row(
                f" {each.row.implementation.name}",
                digits(each.old.median_ms or 0),
                digits(each.new.median_ms or 0),
                f"{each.time:.2f}×",
                "unknown" if math.isinf(each.noise) else f"±{each.noise:.0%}",
                "–" if each.memory is None else f"{each.memory:.2f}×",
                each.verdicts,
            )
    return table
