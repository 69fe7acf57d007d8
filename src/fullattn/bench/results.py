"""The figures of one run, and their JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fullattn._cli.conditions import MODES, Conditions, Environment, Mode
from fullattn._cli.errors import UsageError, describe
from fullattn._cli.shapes import Shape
from fullattn._text import counted
from fullattn.attention import BackendError
from fullattn.bench.implementations import Formula, Implementation

__all__ = ["Failure", "Measurement", "Quantity", "Results", "Row", "read_results"]

Quantity = Literal["time", "memory"]

SCHEMA = 2
_KIND = "fullattn bench"


@dataclass(frozen=True)
class Failure:
    """Why a row has no figure; the run goes on without it.

    Attributes:
        kind: two or three words for the table.
        reason: one sentence for the notes under it.
    """

    kind: str
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Read an exception that an implementation raised."""
        if isinstance(error, BackendError):
            return cls("cannot run", str(error))
        # PyTorch's CPU allocator raises a plain RuntimeError.
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if out_of_memory or "can't allocate memory" in str(error):
            return cls("out of memory", describe(error))
        return cls("failed", describe(error))

    @classmethod
    def too_slow(cls, limit: float) -> Failure:
        """Report a call that takes longer than the limit."""
        return cls("too slow", f"one call did not end within {limit:g} s (--limit)")

    @classmethod
    def no_time_left(cls, budget: float) -> Failure:
        """Report that the run has used up its time before this row."""
        return cls(
            "no time left", f"not begun within its share of the run's {budget:g} s (--budget)"
        )


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

    def value(self, quantity: Quantity, mode: Mode) -> float | None:
        """Return the median milliseconds or the peak bytes, if measured."""
        if mode not in self.measured:
            return None
        found = self.measured[mode]
        return found.median_ms if quantity == "time" else found.peak_bytes


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

    @property
    def modes(self) -> list[Mode]:
        """Modes that were measured at any shape."""
        return [mode for mode in MODES if any(mode in row.measured for row in self.rows)]

    def ratio(self, row: Row, quantity: Quantity, mode: Mode) -> float | None:
        """Return the time or peak memory of a row over the baseline's, where both were measured."""
        base = self.baseline_at(row.shape)
        value, of = row.value(quantity, mode), base and base.value(quantity, mode)
        return value / of if value is not None and of else None

    def caption(self) -> list[str]:
        """Describe the conditions of the figures, line by line."""
        here, how = self.environment, self.conditions
        threads = f", {counted(how.threads, 'thread')}"
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
                "time_over_baseline": self.ratio(row, "time", mode),
                "memory_over_baseline": self.ratio(row, "memory", mode),
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
