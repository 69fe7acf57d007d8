"""What differenced between two runs beyond their noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from fullattn._cli.conditions import Conditions, Mode
from fullattn._cli.errors import UsageError
from fullattn.bench.results import Measurement, Results, Row
from fullattn.bench.table import digits

__all__ = ["Difference", "check_comparable", "differences", "lost", "print_differences"]

# Beyond the noise: more than so many interquartile ranges, and more than this part of the whole.
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
        """New median over old, with the speed of the machine taken out."""
        return (self.new.median_ms or 0) / (self.old.median_ms or 1) / self.machine

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
        if self.old.peak_bytes is None or self.new.peak_bytes is None:
            return False
        grown = self.new.peak_bytes - self.old.peak_bytes
        return grown > max(_LEAST_BYTES, _LEAST * self.old.peak_bytes)


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


def _find(results: Results, row: Row) -> Row | None:
    return next(
        (r for r in results.at(row.shape) if r.implementation.name == row.implementation.name), None
    )


def _pair(old: Results, row: Row | None, mode: Mode) -> tuple[Measurement, Measurement] | None:
    """Return the old and the new measurement of a row, where both have times."""
    before = row and _find(old, row)
    if row is None or before is None:
        return None
    first, second = before.measured.get(mode), row.measured.get(mode)
    return (first, second) if first and second and first.times_ms and second.times_ms else None


def _ratio_and_noise(old: Measurement, new: Measurement) -> tuple[float, float]:
    """Return new median over old, and the relative spread that it inherits from both."""
    relative = [
        math.inf if m.spread_ms is None else m.spread_ms / (m.median_ms or 1.0) for m in (old, new)
    ]
    return (new.median_ms or 0.0) / (old.median_ms or 1.0), math.hypot(*relative)


def differences(old: Results, new: Results) -> list[Difference]:
    """Compare every row and mode that both runs have times for, except the baseline's own.

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
            found.append(Difference(row, mode, *pair, machine=machine, noise=noise))
    return found


def lost(old: Results, new: Results) -> list[tuple[Row, Mode]]:
    """List rows without a time in a mode in which the old run has one."""
    return [
        (row, mode)
        for row in new.rows
        for mode, measurement in row.measured.items()
        if not measurement.times_ms
        and (before := _find(old, row)) is not None
        and mode in before.measured
        and before.measured[mode].times_ms
    ]


def print_differences(old: Results, new: Results, console: Console) -> None:
    """Print what got slower or faster beyond the noise, and a sentence for the rest.

    Args:
        old: the earlier run.
        new: the later one.
        console: where to.
    """
    found = differences(old, new)
    shown = [c for c in found if c.slower or c.faster or c.memory_grew]
    console.print(f"\nCompared with the run of {old.environment.date}:", highlight=False)
    if shown:
        console.print(_table(shown))
    for row, mode in lost(old, new):
        console.print(
            f"{row.implementation.name} at {row.shape}, {mode}: had a time, has none any more."
        )
    slower = sum(difference.slower for difference in found)
    grew = sum(difference.memory_grew for difference in found)
    lines = [
        f"{slower} of {len(found)} times slower beyond the noise, "
        f"{sum(difference.faster for difference in found)} faster, {grew} peaks of memory grew.",
        f"Beyond the noise: more than {_SPREADS:g} interquartile ranges and {_LEAST:.0%}.",
    ]
    if unknown := sum(math.isinf(difference.noise) for difference in found):
        lines.append(f"{unknown} cannot be judged, for want of a second call.")
    machines = sorted({difference.machine for difference in found} - {1.0})
    if machines:
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
    for label, a, b in _other_conditions(old, new):
        lines.append(f"{label}: {a} then, {b} now.")
    for line in lines:
        console.print(line, style="dim", highlight=False, markup=False)


def _other_conditions(old: Results, new: Results) -> list[tuple[str, str, str]]:
    pairs = [
        ("Device", old.environment.device_name, new.environment.device_name),
        ("PyTorch", old.environment.torch, new.environment.torch),
        ("fullattn", old.environment.fullattn, new.environment.fullattn),
        ("Threads", str(old.conditions.threads), str(new.conditions.threads)),
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _table(shown: list[Difference]) -> Table:
    table = Table(title="Differences", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("implementation", "shape", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("old\nms", "new\nms", "time\nover old", "noise", "memory\nover old"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for difference in shown:
        verdicts = [
            name
            for name, holds in (
                ("[red]slower[/red]", difference.slower),
                ("[green]faster[/green]", difference.faster),
                ("[red]more memory[/red]", difference.memory_grew),
            )
            if holds
        ]
        old, new = difference.old, difference.new
        peaks = old.peak_bytes and new.peak_bytes and f"{new.peak_bytes / old.peak_bytes:.2f}×"
        table.add_row(
            difference.row.implementation.name,
            str(difference.row.shape),
            difference.mode,
            digits(old.median_ms or 0),
            digits(new.median_ms or 0),
            f"{difference.time:.2f}×",
            "unknown" if math.isinf(difference.noise) else f"±{difference.noise:.0%}",
            str(peaks or "–"),
            ", ".join(verdicts),
        )
    return table
