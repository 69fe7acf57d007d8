"""The tables of README and documentation, out of the JSON files in benchmarks/results.

README's picture of the layers, docs/layers.svg, is written with them.

    python benchmarks/tables.py            # write them into README.md and docs/*.md
    python benchmarks/tables.py --check    # fail where one is not what the files say

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from runpy import run_path
from typing import Any

from fullattn.bench.report import Report, Row, read_report
from fullattn.bench.table import digits, si
from fullattn.bench.workload import Mode
from fullattn.layers import LAYERS

__all__ = ["ROOT", "TABLES", "fill", "pages"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# What a map sums away, by the features of its cut.
_LOSES = {"hw": "where", "c": "which channel", "h": "the place in a column", "w": "in a row"}


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown with the first column to the left and the others to the right."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cpu() -> Report:
    return read_report(str(RESULTS / "cpu" / "bench.json"))


def _name(row: Row) -> str:
    name = row.contender.title
    quoted = name if row.contender.layer == "official" else f"`{name}`"
    return quoted + (f" ({row.contender.backend})" if row.contender.backend else "")


def _measured(report: Report, row: Row, mode: Mode) -> list[str]:
    """Milliseconds, speed and peak, or what came instead."""
    measurement = row.measured.get(mode)
    if measurement is None:
        return ["", "", ""]
    if measurement.failure is not None:
        return [measurement.failure.kind, "", ""]
    slower, peak = report.time_ratio(row, mode), measurement.peak_bytes
    assert measurement.median_ms is not None
    return [
        digits(measurement.median_ms),
        f"{1 / slower:.2f}×" if slower else "–",
        digits(peak / 2**20) if peak is not None else "–",
    ]


def _conditions(report: Report) -> str:
    return " ".join(f"{line}." for line in report.caption())


def cpu_tables() -> str:
    """Every shape of the CPU's run, with its conditions."""
    report = _cpu()
    parts = []
    for shape in report.shapes:
        rows = sorted(report.at(shape), key=lambda row: row.time("inference") or float("inf"))
        modes: list[Mode] = [m for m in ("inference", "training") if m in rows[0].measured]
        headings = ["contender", "forward ms", "speed", "peak MiB"]
        if "training" in modes:
            headings += ["forward + backward ms", "speed", "peak MiB"]
        cells = [
            [_name(row), *(cell for mode in modes for cell in _measured(report, row, mode))]
            for row in rows
        ]
        parts += [f"**{shape}**", _table(headings, cells)]
    base = report.baseline_title()
    parts.append(f"Speed against the {base}. {_conditions(report)}")
    return "\n\n".join(parts)


def _loses(layer: str) -> str:
    """What the maps of a layer, or of the official implementation, sum away."""
    cuts = LAYERS.get(layer, LAYERS["fully"]).operation.cuts
    return ", ".join(_LOSES[cut.features] for cut in cuts)


def home_table() -> str:
    """The three layers at the paper's size: what they keep and what it costs."""
    report = _cpu()
    shape = next(shape for shape in report.shapes if str(shape) == "512x97x97")
    rows = {row.contender.layer: row for row in report.at(shape) if row.contender.automatic}
    public = report.baseline_at(shape)
    assert public is not None
    cells = []
    for row in (rows["fully"], rows["channel"], rows["spatial"], public):
        formula = row.formula
        assert formula.map_bytes is not None
        forward, training = (_measured(report, row, mode) for mode in ("inference", "training"))
        cells.append(
            [
                _name(row),
                _loses(row.contender.layer),
                si(formula.flops),
                digits(formula.map_bytes / 2**20),
                forward[0],
                training[0],
                training[2],
            ]
        )
    headings = ["512×97×97", "loses", "FLOPs", "maps MiB", "forward ms"]
    headings += ["forward + backward ms", "its peak MiB"]
    here = report.environment
    about = f"{here.device_name}, {report.conditions.threads} threads, {report.conditions.dtype}"
    about += f", PyTorch {here.torch}, {here.date[:10]}."
    return f"{_table(headings, cells)}\n\n{about}"


def flanet_step_table() -> str:
    """A training step of FLANet with our layer and with the official implementation."""
    cells, about = [], []
    for path in sorted((RESULTS / "cpu").glob("flanet_step_*.json")):
        data = json.loads(path.read_text())
        ours, public = data["milliseconds"]["fullattn"], data["milliseconds"]["official"]
        pairs = [theirs / our for our, theirs in zip(ours, public, strict=True)]
        cells.append(
            [
                f"`{data['backbone']}`",
                *(f"{statistics.median(each) / 1000:.2f}" for each in (ours, public)),
                f"{statistics.median(pairs):.2f}×",
                f"{min(pairs):.2f}× to {max(pairs):.2f}×",
                *(f"{data['peak_bytes'][name] / 2**20:.0f}" for name in ("fullattn", "official")),
            ]
        )
        shape = "×".join(map(str, data["shape"]))
        about.append(
            f"images {shape}, {data['device']}, {data['threads']} threads, torch {data['torch']}, "
            f"{len(pairs)} pairs of steps in turns"
        )
    headings = [
        "backbone",
        "fullattn s",
        "official implementation s",
        "speed, median of pairs",
        "pairs",
    ]
    headings += ["fullattn peak MiB", "official peak MiB"]
    return f"{_table(headings, cells)}\n\n{'; '.join(dict.fromkeys(about))}."


def camvid_tables() -> str:
    """CamVid, as benchmarks/camvid.py has tabulated it from its runs."""
    return (RESULTS / "camvid" / "table.md").read_text().strip()


def gpu_tables() -> str:
    """What benchmarks/gpu.py measured on each GPU, or that nothing has been measured yet."""
    files = sorted(RESULTS.glob("*/gpu.json"))
    if not files:
        return "**Not measured yet**: no GPU has run `benchmarks/gpu.py` so far."
    return "\n\n".join(gpu_table(json.loads(path.read_text())) for path in files)


def gpu_table(data: dict[str, Any]) -> str:
    """What one run of benchmarks/gpu.py measured.

    Args:
        data: of its gpu.json.

    Returns:
        A table for each shape and dtype, with the conditions.
    """
    parts = []
    rows = data.get("rows", [])
    for shape, dtype in dict.fromkeys((tuple(row["shape"]), row["dtype"]) for row in rows):
        here = [row for row in rows if (tuple(row["shape"]), row["dtype"]) == (shape, dtype)]
        cells = []
        for contender in dict.fromkeys(row["contender"] for row in here):
            line = [contender]
            for mode in ("inference", "training"):
                found = [r for r in here if (r["contender"], r["mode"]) == (contender, mode)]
                times = found[0]["milliseconds"] if found else []
                peak = found[0]["peak_bytes"] if found else None
                line.append(f"{statistics.median(times):.4g}" if times else "–")
                line.append(f"{peak / 2**20:.1f}" if peak is not None else "–")
            cells.append(line)
        headings = ["contender", "forward ms", "peak MiB", "forward + backward ms", "peak MiB"]
        parts += [f"**{'×'.join(map(str, shape))}, {dtype}**", _table(headings, cells)]
    about = data["about"]
    parts.append(
        f"{about['device_name']}, torch {about['torch']}, triton {about['triton']}, driver "
        f"{about['driver']}, {about['date']}; medians."
        + (" **A rehearsal without a GPU: times mean nothing.**" if about["rehearsal"] else "")
    )
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "home": home_table,
    "cpu": cpu_tables,
    "flanet_step": flanet_step_table,
    "camvid": camvid_tables,
    "gpu": gpu_tables,
}


def fill(text: str) -> str:
    """A page with each generated part made anew.

    Args:
        text: of the page.

    Returns:
        The text with the tables that the result files give.
    """
    return _PART.sub(lambda part: f"{part[1]}\n{TABLES[part[2]]()}\n\n{part[3]}", text)


def pages() -> list[Path]:
    """The files that have generated parts, or may have."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    """Write the tables and README's picture, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check
    stale = []
    for path in pages():
        text = path.read_text()
        filled = fill(text)
        if filled != text:
            stale.append(path)
            if not check:
                path.write_text(filled)
    picture = ROOT / "docs" / "layers.svg"
    drawn = run_path(str(ROOT / "docs" / "figures.py"))["standalone"]()
    if not picture.exists() or picture.read_text() != drawn:
        stale.append(picture)
        if not check:
            picture.write_text(drawn)
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
