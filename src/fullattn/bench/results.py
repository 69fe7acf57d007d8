"""The figures of one run, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullattn._cli.conditions import MODES, Conditions, Environment, Mode
from fullattn._cli.errors import UsageError
from fullattn._cli.shapes import Shape
from fullattn.bench.implementations import Formula, Implementation
from fullattn.bench.measure import Failure

__all__ = ["Measurement", "Results", "Row", "read_results"]

SCHEMA = 2
_KIND = "fullattn bench"


@dataclass(frozen=True)
class Measurement:
    """Times and peak memory of an implementation at a shape in one mode.

    Attributes:
        times_ms: every timed call.
        peak_bytes: peak memory over the inputs; None where it was not measured.
        failure: why there are no times.
    """

    times_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: Failure | None = None

    @property
    def median_ms(self) -> float | None:
        """Median of the times."""
        return statistics.median(self.times_ms) if self.times_ms else None

    @property
    def spread_ms(self) -> float | None:
        """Interquartile range of the times; None for a single one."""
        if len(self.times_ms) < 2:
            return None
        first, _, third = statistics.quantiles(self.times_ms, n=4, method="inclusive")
        return third - first


@dataclass(frozen=True)
class Row:
    """An implementation at a shape; `measured` has the modes that were measured."""

    shape: Shape
    implementation: Implementation
    formula: Formula
    measured: dict[Mode, Measurement]

    def time(self, mode: Mode) -> float | None:
        """Return the median milliseconds, if measured."""
        return self.measured[mode].median_ms if mode in self.measured else None

    def peak(self, mode: Mode) -> int | None:
        """Return the peak bytes, if measured."""
        return self.measured[mode].peak_bytes if mode in self.measured else None


@dataclass(frozen=True)
class Results:
    """The figures of a run.

    Attributes:
        environment: where and when.
        conditions: shared by all implementations.
        baseline: what the ratios refer to, as given on the command line.
        sweep: the axis that was swept, if one was.
        rows: shape by shape.
    """

    environment: Environment
    conditions: Conditions
    baseline: str
    sweep: str | None
    rows: list[Row]

    @property
    def shapes(self) -> list[Shape]:
        """Shapes in the order in which they were run."""
        return list(dict.fromkeys(row.shape for row in self.rows))

    def at(self, shape: Shape) -> list[Row]:
        """Return the rows of one shape."""
        return [row for row in self.rows if row.shape == shape]

    def baseline_at(self, shape: Shape) -> Row | None:
        """Return the row that the ratios of a shape refer to."""
        return next((r for r in self.at(shape) if r.implementation.matches(self.baseline)), None)

    def baseline_title(self) -> str:
        """Name of the baseline in tables and pictures."""
        rows = [self.baseline_at(shape) for shape in self.shapes]
        titles = dict.fromkeys(row.implementation.title for row in rows if row is not None)
        return ", ".join(titles) or self.baseline

    def time_ratio(self, row: Row, mode: Mode) -> float | None:
        """Return the time of a row over the baseline's, where both were measured."""
        base = self.baseline_at(row.shape)
        return None if base is None else _ratio(row.time(mode), base.time(mode))

    def memory_ratio(self, row: Row, mode: Mode) -> float | None:
        """Return the peak memory of a row over the baseline's, where both were measured."""
        base = self.baseline_at(row.shape)
        return None if base is None else _ratio(row.peak(mode), base.peak(mode))

    def caption(self) -> list[str]:
        """Describe the conditions of the figures, line by line."""
        here, how = self.environment, self.conditions
        threads = f", {how.threads} thread{'s' if how.threads != 1 else ''}"
        device = f"{here.device_name} ({how.device}{threads if how.device == 'cpu' else ''})"
        load = "" if here.load is None else f", load {here.load:g} before"
        projection = "with" if how.project else "without"
        return [
            f"{device}, {how.dtype}, {how.memory_format}, {here.platform}, {here.date}{load}",
            f"fullattn {here.fullattn}, torch {here.torch}, einops {here.einops}, "
            f"Python {here.python}",
            f"inputs: {how.input_kind}; FullyAttentional and the official implementation "
            f"{projection} their 3x3 projection; gamma {how.gamma:g}",
        ]

    def to_json(self) -> str:
        """Write everything as JSON, with medians and ratios beside the single times."""
        data = {
            "kind": _KIND,
            "schema": SCHEMA,
            "units": "times in milliseconds, memory in bytes, FLOPs are 2 x multiply-accumulate",
            "environment": dataclasses.asdict(self.environment),
            "conditions": dataclasses.asdict(self.conditions)
            | {"input": self.conditions.input_kind},
            "baseline": self.baseline,
            "sweep": self.sweep,
            "rows": [self._row_data(row) for row in self.rows],
        }
        return json.dumps(data, indent=1) + "\n"

    def _row_data(self, row: Row) -> dict[str, Any]:
        data: dict[str, Any] = {
            "shape": list(row.shape),
            "name": row.implementation.name,
            "implementation": dataclasses.asdict(row.implementation),
            "formula": dataclasses.asdict(row.formula),
        }
        for mode, measurement in row.measured.items():
            data[mode] = dataclasses.asdict(measurement) | {
                "median_ms": measurement.median_ms,
                "interquartile_range_ms": measurement.spread_ms,
                "time_over_baseline": self.time_ratio(row, mode),
                "memory_over_baseline": self.memory_ratio(row, mode),
            }
        return data

    @classmethod
    def from_json(cls, text: str) -> Results:
        """Read what `to_json` wrote.

        Args:
            text: the file's content.

        Returns:
            The results.

        Raises:
            ValueError: it is not JSON of `fullattn bench`, or of a schema this version cannot read.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("kind") != _KIND:
            raise ValueError(f'expected JSON with "kind": "{_KIND}"')
        if data.get("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}, got {data.get('schema')!r}")
        try:
            conditions = dict(data["conditions"])
            conditions.pop("input")
            return cls(
                environment=Environment(**data["environment"]),
                conditions=Conditions(**conditions),
                baseline=data["baseline"],
                sweep=data["sweep"],
                rows=[_row_of(row) for row in data["rows"]],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected the fields of schema {SCHEMA}, missed {error}") from error


def _row_of(data: dict[str, Any]) -> Row:
    return Row(
        shape=Shape(*data["shape"]),
        implementation=Implementation(**data["implementation"]),
        formula=Formula(**data["formula"]),
        measured={
            mode: Measurement(
                times_ms=data[mode]["times_ms"],
                peak_bytes=data[mode]["peak_bytes"],
                failure=data[mode]["failure"] and Failure(**data[mode]["failure"]),
            )
            for mode in MODES
            if mode in data
        },
    )


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def read_results(path: str) -> Results:
    """Read results from a file.

    Args:
        path: of a JSON file that `fullattn bench` wrote.

    Returns:
        The results.

    Raises:
        UsageError: the file is not there or not such a file.
    """
    try:
        return Results.from_json(Path(path).read_text())
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"expected a bench.json at {path!r}: {reason.lower()}") from error
    except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
        raise UsageError(
            f"expected a bench.json of `fullattn bench` at {path!r}: {error}"
        ) from error
