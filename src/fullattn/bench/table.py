"""Results as tables for a terminal of 120 columns."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from fullattn._cli.conditions import Mode
from fullattn._text import NOTHING, digits, si
from fullattn.bench.implementations import Formula
from fullattn.bench.results import Measurement, Results, Row

__all__ = ["mebibytes", "print_results", "ratio", "time"]

_MIB = 2**20
_CALL: dict[Mode, str] = {"inference": "forward", "training": "forward\n+ backward"}


def _name(row: Row) -> str:
    star = "*" if row.implementation.automatic else ""
    return f" {row.implementation.title} [cyan]{row.implementation.backend or ''}{star}[/cyan]"


def time(measurement: Measurement | None) -> str:
    """Format median milliseconds ± interquartile range, the failure, or a dash."""
    if measurement is None:
        return NOTHING
    if measurement.failure is not None:
        return f"[red]{measurement.failure.kind}[/red]"
    if measurement.median_ms is None:
        return NOTHING
    spread = measurement.spread_ms
    return digits(measurement.median_ms) + ("" if spread is None else f" ± {digits(spread)}")


def mebibytes(number: float | None) -> str:
    """Format bytes in MiB, or a dash."""
    return NOTHING if number is None else digits(number / _MIB)


def ratio(number: float | None) -> str:
    """Format a ratio as 1.23×, or a dash."""
    return NOTHING if number is None else f"{digits(number)}×"


def _table(
    results: Results, title: str, headings: list[str], cells: Callable[[Row], list[str]]
) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("implementation, backend", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for shape in results.shapes:
        table.add_section()
        table.add_row(f"[bold]{shape}[/bold]")
        for row in results.at(shape):
            table.add_row(_name(row), *cells(row))
    return table


def _measured(results: Results) -> Table:
    modes = results.modes

    def cells(row: Row) -> list[str]:
        found = []
        for mode in modes:
            slower = results.ratio(row, "time", mode)
            found += [
                time(row.measured.get(mode)),
                ratio(1 / slower if slower else None),
                mebibytes(row.value("memory", mode)),
                ratio(results.ratio(row, "memory", mode)),
            ]
        return found

    headings = [
        heading
        for mode in modes
        for heading in (f"{_CALL[mode]}\nms", "speed\n× base", "peak\nMiB", "peak\n× base")
    ]
    return _table(results, "Measured", headings, cells)


_FORMULA: dict[str, Callable[[Formula], str]] = {
    "parameters": lambda formula: si(formula.parameters),
    "FLOPs by\nformula": lambda formula: si(formula.flops),
    "FLOPs by\nPyTorch": lambda formula: si(formula.counted_flops),
    "elements\nin maps": lambda formula: si(formula.map_numel),
    "maps\nMiB": lambda formula: mebibytes(formula.map_bytes),
    "peak MiB\ninference": lambda formula: mebibytes(formula.inference_bytes),
    "peak MiB\ntraining": lambda formula: mebibytes(formula.training_bytes),
}


def _by_formula(results: Results) -> Table:
    def cells(row: Row) -> list[str]:
        return [cell(row.formula) for cell in _FORMULA.values()]

    return _table(results, "By formula", list(_FORMULA), cells)


def _notes(results: Results) -> list[str]:
    notes = [
        "Times: median ± interquartile range of interleaved calls (no ± for a single call). "
        "Peaks: over the inputs.",
        f"Base: {results.baseline_title()}. A speed above 1× is faster, a peak below 1× smaller.",
        "* the automatic choice of backend. FLOPs are 2 × multiply-accumulate, of one forward.",
    ]
    for shape in results.shapes:
        base = results.baseline_at(shape)
        if base is None:
            notes.append(
                f"{shape}: no ratios, because the baseline {results.baseline} was not measured."
            )
            continue
        for mode in results.modes:
            if mode in base.measured and base.value("time", mode) is None:
                notes.append(f"{shape}, {mode}: no ratios, because the baseline has no time.")
    missing: dict[tuple[str, str], list[str]] = {}
    for row in results.rows:
        for mode, measurement in row.measured.items():
            if measurement.failure is not None:
                key = f"{row.shape}, {mode}", measurement.failure.reason
                missing.setdefault(key, []).append(row.implementation.name)
    notes += [f"{where}, {', '.join(names)}: {why}" for (where, why), names in missing.items()]
    return notes


def print_results(results: Results, console: Console) -> None:
    """Print both tables with the conditions and notes.

    Args:
        results: what to print.
        console: where to.
    """
    console.print()
    for table in (_by_formula(results), _measured(results)):
        console.print(table)
        console.print()
    for line in (*results.caption(), *_notes(results)):
        console.print(line, style="dim", highlight=False, markup=False)
