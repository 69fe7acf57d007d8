"""What changed between two runs beyond their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from fullattn._cli.conditions import Mode
from fullattn._cli.errors import UsageError
from fullattn.bench.results import Measurement, Report, Row
from fullattn.bench.table import digits

__all__ = ["Change", "changes", "check_comparable", "lost", "print_changes"]

# Beyond the noise: more than so many interquartile ranges, and more than this part of the whole.
_SPREADS = 2.0
_LEAST = 0.05
_LEAST_BYTES = 2**20


@dataclass(frozen=True)
class Change:
    """One row in one mode, then and now.

    Attributes:
        row: the new row.
        mode: inference or training.
        then: the old measurement.
        now: the new one.
        machine: how much longer the baseline took than then; 1 where the runs share no baseline.
        noise: how far `time` may be from 1 by chance; infinite where one of the times is of a
            single call.
    """

    row: Row
    mode: Mode
    then: Measurement
    now: Measurement
    machine: float
    noise: float

    @property
    def time(self) -> float:
        """New median over old, with the speed of the machine taken out."""
        return (self.now.median_ms or 0) / (self.then.median_ms or 1) / self.machine

    @property
    def slower(self) -> bool:
        """Whether it takes longer beyond the noise."""
        return self.time > 1 + self.noise

    @property
    def faster(self) -> bool:
        """Whether it takes less time beyond the noise."""
        return self.time < 1 / (1 + self.noise)

    @property
    def memory_grew(self) -> bool:
        """Whether the peak grew by more than 5 % and by more than 1 MiB."""
        if self.then.peak_bytes is None or self.now.peak_bytes is None:
            return False
        grown = self.now.peak_bytes - self.then.peak_bytes
        return grown > max(_LEAST_BYTES, _LEAST * self.then.peak_bytes)


def check_comparable(old: Report, new: Report) -> None:
    """Raise UsageError unless two runs are made under conditions that can be compared.

    Args:
        old: the run of the file given.
        new: the run to be made; its rows are not looked at.
    """
    then, now = old.conditions, new.conditions
    for what in ("device", "dtype", "memory_format", "project"):
        if getattr(then, what) != getattr(now, what):
            raise UsageError(
                f"expected an old run with {what} {getattr(now, what)} to compare with, "
                f"got {getattr(then, what)}"
            )
    if (then.image is None) != (now.image is None):
        raise UsageError(f"expected an old run with {now.input_kind}, got {then.input_kind}")


def _find(report: Report, row: Row) -> Row | None:
    return next((r for r in report.at(row.shape) if r.contender.name == row.contender.name), None)


def _pair(old: Report, row: Row | None, mode: Mode) -> tuple[Measurement, Measurement] | None:
    """The old and the new measurement of a row, where both have times."""
    before = row and _find(old, row)
    if row is None or before is None:
        return None
    then, now = before.measured.get(mode), row.measured.get(mode)
    return (then, now) if then and now and then.times_ms and now.times_ms else None


def _ratio_and_noise(then: Measurement, now: Measurement) -> tuple[float, float]:
    """New median over old, and the relative spread that it inherits from both."""
    relative = [
        math.inf if m.spread_ms is None else m.spread_ms / (m.median_ms or 1.0) for m in (then, now)
    ]
    return (now.median_ms or 0.0) / (then.median_ms or 1.0), math.hypot(*relative)


def changes(old: Report, new: Report) -> list[Change]:
    """Every row and mode that both runs have times for, but the baseline's own.

    Times are compared as ratios to the new run's baseline, taken from each run itself, so that a
    machine that is slower as a whole raises no alarm. Where the runs have no baseline in common
    they are compared in milliseconds.

    Args:
        old: the earlier run.
        new: the later one.

    Returns:
        One entry for each, in the new run's order.
    """
    found = []
    for row in new.rows:
        base = new.baseline_at(row.shape)
        if row is base:
            continue
        for mode in row.measured:
            pair = _pair(old, row, mode)
            if pair is None:
                continue
            _, noise = _ratio_and_noise(*pair)
            base_pair = _pair(old, base, mode)
            machine, machine_noise = _ratio_and_noise(*base_pair) if base_pair else (1.0, 0.0)
            noise = max(_LEAST, _SPREADS * math.hypot(noise, machine_noise))
            found.append(Change(row, mode, *pair, machine=machine, noise=noise))
    return found


def lost(old: Report, new: Report) -> list[tuple[Row, Mode]]:
    """Rows of the new run that have no time in a mode in which the old run has one."""
    return [
        (row, mode)
        for row in new.rows
        for mode, now in row.measured.items()
        if not now.times_ms
        and (before := _find(old, row)) is not None
        and mode in before.measured
        and before.measured[mode].times_ms
    ]


def print_changes(old: Report, new: Report, console: Console) -> None:
    """Print what got slower or faster beyond the noise, and a sentence for the rest.

    Args:
        old: the earlier run.
        new: the later one.
        console: where to.
    """
    found = changes(old, new)
    shown = [c for c in found if c.slower or c.faster or c.memory_grew]
    console.print(f"\nCompared with the run of {old.environment.date}:", highlight=False)
    if shown:
        console.print(_table(shown))
    for row, mode in lost(old, new):
        console.print(f"{row.contender.name} at {row.shape}, {mode}: had a time, has none now.")
    slower = sum(change.slower for change in found)
    grew = sum(change.memory_grew for change in found)
    lines = [
        f"{slower} of {len(found)} times slower beyond the noise, "
        f"{sum(change.faster for change in found)} faster, {grew} peaks of memory grew.",
        f"Beyond the noise: more than {_SPREADS:g} interquartile ranges and {_LEAST:.0%}.",
    ]
    if unknown := sum(math.isinf(change.noise) for change in found):
        lines.append(f"{unknown} cannot be judged, for want of a second call.")
    machines = sorted({change.machine for change in found} - {1.0})
    if machines:
        lines.append(
            f"Times are taken over the baseline's, which itself took {machines[0]:.3g} to "
            f"{machines[-1]:.3g} times as long as then."
        )
    else:
        lines.append("The runs have no baseline in common, so milliseconds are compared.")
    if not found:
        lines = ["The two runs have no row in common: no contender at the same shape and mode."]
    for label, a, b in _differences(old, new):
        lines.append(f"{label} then: {a}; now: {b}.")
    for line in lines:
        console.print(line, style="dim", highlight=False, markup=False)


def _differences(old: Report, new: Report) -> list[tuple[str, str, str]]:
    pairs = [
        ("Device", old.environment.device_name, new.environment.device_name),
        ("PyTorch", old.environment.torch, new.environment.torch),
        ("fullattn", old.environment.fullattn, new.environment.fullattn),
        ("Threads", str(old.conditions.threads), str(new.conditions.threads)),
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _table(shown: list[Change]) -> Table:
    table = Table(title="Changes", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("contender", "shape", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("then\nms", "now\nms", "time\nover then", "noise", "memory\nover then"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for change in shown:
        verdicts = [
            name
            for name, holds in (
                ("[red]slower[/red]", change.slower),
                ("[green]faster[/green]", change.faster),
                ("[red]more memory[/red]", change.memory_grew),
            )
            if holds
        ]
        then, now = change.then, change.now
        peaks = then.peak_bytes and now.peak_bytes and f"{now.peak_bytes / then.peak_bytes:.2f}×"
        table.add_row(
            change.row.contender.name,
            str(change.row.shape),
            change.mode,
            digits(then.median_ms or 0),
            digits(now.median_ms or 0),
            f"{change.time:.2f}×",
            "unknown" if math.isinf(change.noise) else f"±{change.noise:.0%}",
            str(peaks or "–"),
            ", ".join(verdicts),
        )
    return table
