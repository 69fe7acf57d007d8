"""A comparison of two measurements as one sentence to repeat, which admits what is only noise."""

from __future__ import annotations

import math

from fullattn._cli.conditions import Mode
from fullattn._text import digits
from fullattn.bench.implementations import OFFICIAL
from fullattn.bench.results import Measurement, Results
from fullattn.layers import LAYERS

__all__ = ["headline", "relative_spread", "verdict"]


def relative_spread(*measurements: Measurement) -> float:
    """Return the relative spread that a ratio inherits; infinite where one has a single call."""
    return math.hypot(
        *(
            math.inf if each.spread_ms is None else each.spread_ms / (each.median_ms or 1.0)
            for each in measurements
        )
    )


def verdict(found: Measurement, base: Measurement, what: str) -> str | None:
    """Compare time and memory in one sentence; None where one of the two has no time.

    A difference in time is claimed if it is larger than the spread of the timings.

    Args:
        found: what is judged.
        base: what it is compared with.
        what: name of the base.

    Example:
        >>> verdict(Measurement([2.0, 2.1], 2**20), Measurement([5.0, 5.1], 17 * 2**20), "before")
        '2.46× as fast, 1/17 of the memory of before'
        >>> verdict(Measurement([2.0]), Measurement([3.0]), "before")
        '1.50× as fast (timed once, so with an unknown spread) as before'
    """
    if found.median_ms is None or base.median_ms is None:
        return None
    faster = base.median_ms / found.median_ms
    spread = relative_spread(found, base)
    if math.isinf(spread):
        time, joined = f"{digits(faster)}× as fast (timed once, so with an unknown spread)", "as"
    elif max(faster, 1 / faster) <= 1 + spread:
        figures = f"{digits(faster)} ± {digits(faster * spread)} times as fast"
        time, joined = f"no difference in time beyond the spread of the timings ({figures})", "from"
    elif faster > 1:
        time, joined = f"{digits(faster)}× as fast", "as"
    else:
        time, joined = f"{digits(1 / faster)}× the time", "of"
    if not (found.peak_bytes and base.peak_bytes):
        return f"{time} {joined} {what}"
    return f"{time}, {_memory(found.peak_bytes / base.peak_bytes)} of {what}"


def _memory(ratio: float) -> str:
    if ratio > 0.5:
        return f"{digits(ratio)}× the memory"
    return f"1/{1 / ratio:.{0 if ratio <= 0.1 else 1}f} of the memory".replace(".0 ", " ")


def headline(results: Results, mode: Mode) -> str | None:
    """Compare the user's module, or else the first layer, with the baseline, at the first shape.

    Returns:
        One sentence, or None where no shape has times of both.
    """
    for shape in results.shapes:
        base, rows = results.baseline_at(shape), results.at(shape)
        yours = [row for row in rows if row.implementation.layer not in (OFFICIAL, *LAYERS)]
        for row in yours + [row for row in rows if row.implementation.automatic]:
            if base is None or row is base or not {mode} <= row.measured.keys() & base.measured:
                continue
            named = base.implementation
            what = f"the {named.title}" if named.layer == OFFICIAL else named.name
            if said := verdict(row.measured[mode], base.measured[mode], f"{what} here"):
                return f"{row.implementation.title}, {mode} at {shape}: {said}."
    return None
