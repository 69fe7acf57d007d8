"""Results as tables: few wide ones on a wide terminal, more narrow ones in 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from fullattn._cli.conditions import Mode
from fullattn._text import NOTHING, digits, si
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


# Heading and cell of each column.
_Columns = Sequence[tuple[str, Callable[[Row], str]]]


def _table(results: Results, title: str, columns: _Columns) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("implementation, backend", overflow="ellipsis")
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for shape in results.shapes:
        rows = [(_name(row), [cell(row) for _, cell in columns]) for row in results.at(shape)]
        if {cell for _, cells in rows for cell in cells} == {NOTHING}:  # not run in this mode
            continue
        table.add_section()
        table.add_row(f"[bold]{shape}[/bold]")
        for name, cells in rows:
            table.add_row(name, *cells)
    return table


def _tables(
    results: Results, title: str, groups: Mapping[str, _Columns], console: Console
) -> list[Table]:
    """Make one table with the columns of all groups, or one a group where that is too wide."""
    table = _table(results, title, [column for columns in groups.values() for column in columns])
    unlimited = console.options.update(max_width=10**4)
    if console.measure(table, options=unlimited).maximum <= console.width:
        return [table]
    return [_table(results, f"{title}: {name}", columns) for name, columns in groups.items()]


def _measured(results: Results, mode: Mode) -> _Columns:
    def speed(row: Row) -> str:
        slower = results.ratio(row, "time", mode)
        return ratio(1 / slower if slower else None)

    return [
        (f"{_CALL[mode]}\nms", lambda row: time(row.measured.get(mode))),
        ("speed\n× base", speed),
        ("peak\nMiB", lambda row: mebibytes(row.value("memory", mode))),
        ("peak\n× base", lambda row: ratio(results.ratio(row, "memory", mode))),
    ]


_FORMULA: dict[str, _Columns] = {
    "parameters and FLOPs": [
        ("parameters", lambda row: si(row.formula.parameters)),
        ("FLOPs by\nformula", lambda row: si(row.formula.flops)),
        ("FLOPs by\nPyTorch", lambda row: si(row.formula.counted_flops)),
        ("elements\nin maps", lambda row: si(row.formula.map_numel)),
    ],
    "memory": [
        ("maps\nMiB", lambda row: mebibytes(row.formula.map_bytes)),
        ("peak MiB\ninference", lambda row: mebibytes(row.formula.inference_bytes)),
        ("peak MiB\ntraining", lambda row: mebibytes(row.formula.training_bytes)),
    ],
}


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
    """Print the tables with the conditions and notes.

    Args:
        results: what to print.
        console: where to.
    """
    console.print()
    measured: dict[str, _Columns] = {mode: _measured(results, mode) for mode in results.modes}
    for title, groups in (("By formula", _FORMULA), ("Measured", measured)):
        for table in _tables(results, title, groups, console):
            console.print(table)
            console.print()
    for line in (*results.caption(), *_notes(results)):
        console.print(line, style="dim", highlight=False, markup=False)
