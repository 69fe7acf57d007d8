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

from fullattn._cli.conditions import Mode
from fullattn._text import digits, si
from fullattn.bench.results import Results, Row, read_results
from fullattn.layers import LAYERS

__all__ = ["ROOT", "TABLES", "fill", "pages"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# What a map sums over, by the features of its cut.
_SUMS = {
    "hw": "the whole place",
    "c": "the channels",
    "h": "the place in a column",
    "w": "in a row",
}


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown with the first column to the left and the others to the right."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cpu() -> Results:
    return read_results(str(RESULTS / "cpu" / "bench.json"))


def _name(row: Row) -> str:
    name = row.implementation.title
    quoted = name if row.implementation.layer == "official" else f"`{name}`"
    return quoted + (f" ({row.implementation.backend})" if row.implementation.backend else "")


def _measured(report: Results, row: Row, mode: Mode) -> list[str]:
    """Milliseconds, speed and peak, or what came instead."""
    measurement = row.measured.get(mode)
    if measurement is None:
        return ["", "", ""]
    if measurement.failure is not None:
        return [measurement.failure.kind, "", ""]
    slower, peak = report.ratio(row, "time", mode), measurement.peak_bytes
    assert measurement.median_ms is not None
    return [
        digits(measurement.median_ms),
        f"{1 / slower:.2f}×" if slower else "–",
        digits(peak / 2**20) if peak is not None else "–",
    ]


def _conditions(report: Results) -> str:
    return " ".join(f"{line}." for line in report.caption())


def cpu_tables() -> str:
    """Every shape of the CPU's run, with its conditions."""
    report = _cpu()
    parts = []
    for shape in report.shapes:
        rows = sorted(
            report.at(shape), key=lambda row: row.value("time", "inference") or float("inf")
        )
        modes: list[Mode] = [m for m in ("inference", "training") if m in rows[0].measured]
        headings = ["implementation", "forward ms", "speed", "peak MiB"]
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


def _sums_over(layer: str) -> str:
    """Say what the maps of a layer, or of the official implementation, sum over."""
    cuts = LAYERS.get(layer, LAYERS["fully"]).operation.cuts
    return ", ".join(_SUMS[cut.features] for cut in cuts)


def home_table() -> str:
    """Compare the three layers at the paper's size: what they keep and what it costs."""
    report = _cpu()
    shape = next(shape for shape in report.shapes if str(shape) == "512x97x97")
    rows = {
        row.implementation.layer: row for row in report.at(shape) if row.implementation.automatic
    }
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
                _sums_over(row.implementation.layer),
                si(formula.flops),
                digits(formula.map_bytes / 2**20),
                forward[0],
                training[0],
                training[2],
            ]
        )
    headings = ["512×97×97", "sums over", "FLOPs", "maps MiB", "forward ms"]
    headings += ["forward + backward ms", "its peak MiB"]
    here = report.environment
    about = f"{here.device_name}, {report.conditions.threads} threads, {report.conditions.dtype}"
    about += f", PyTorch {here.torch}, {here.date[:10]}."
    return f"{_table(headings, cells)}\n\n{about}\n\n{_step_sentence()}"


def _steps() -> list[dict[str, Any]]:
    """Read the training steps of FLANet, with the speed in each pair of steps."""
    found = []
    for path in sorted((RESULTS / "cpu").glob("flanet_step_*.json")):
        data = json.loads(path.read_text())
        ours, public = data["milliseconds"]["fullattn"], data["milliseconds"]["official"]
        pairs = [theirs / our for our, theirs in zip(ours, public, strict=True)]
        found.append(
            {
                **data,
                "pairs": len(pairs),
                "speed": f"{statistics.median(pairs):.2f}×",
                "range": f"{min(pairs):.2f}× to {max(pairs):.2f}×",
            }
        )
    return found


def _step_sentence() -> str:
    """Tell the speed of a whole network's training step."""
    told = [f"{data['speed']} with `{data['backbone']}` ({data['range']})" for data in _steps()]
    return (
        "Of a training step of the whole FLANet on a CPU, the speed against the official "
        f"implementation is {' and '.join(told)}."
    )


def readme_table() -> str:
    """Compare the layer with the official implementation: on a CPU, and on the first GPU."""
    report = _cpu()
    rows = [row for row in report.at(report.shapes[0]) if row.implementation.automatic]
    public, ours = report.baseline_at(report.shapes[0]), rows[0]
    assert public is not None
    cells = []
    for row in (public, ours):
        forward, training = (_measured(report, row, mode) for mode in ("inference", "training"))
        cells.append([f"CPU, {row.shape}: {_name(row)}", forward[0], training[0], training[2]])
    here = report.environment
    about = [f"{here.device_name}, {report.conditions.threads} threads, PyTorch {here.torch}"]
    for data in _gpu_runs()[:1]:
        card, first = data["about"], data["rows"][0]
        place = f"GPU, {'x'.join(map(str, first['shape']))} {first['dtype']}"
        names = {"official": "official implementation", "fully, triton": ours.implementation.title}
        for name, title in names.items():
            title = f"`{title}` (triton)" if name != "official" else title
            forward, _, training, peak = _best_gpu_figures(data, name)
            cells.append([f"{place}: {title}", forward, training, peak])
        about.append(f"{card['device_name']}, PyTorch {card['torch']}")
    headings = ["", "forward ms", "forward + backward ms", "its peak MiB"]
    conditions = f"{'; '.join(about)}. Medians; peaks over the inputs."
    return f"{_table(headings, cells)}\n\n{conditions}\n\n{_step_sentence()}"


def flanet_step_table() -> str:
    """Compare a training step of FLANet with our layer and with the official implementation."""
    cells, about = [], []
    for data in _steps():
        times = (data["milliseconds"][name] for name in ("fullattn", "official"))
        cells.append(
            [
                f"`{data['backbone']}`",
                *(f"{statistics.median(each) / 1000:.2f}" for each in times),
                data["speed"],
                data["range"],
                *(f"{data['peak_bytes'][name] / 2**20:.0f}" for name in ("fullattn", "official")),
            ]
        )
        shape = "×".join(map(str, data["shape"]))
        about.append(
            f"images {shape}, {data['device']}, {data['threads']} threads, torch {data['torch']}, "
            f"{data['pairs']} interleaved pairs of steps"
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


def _gpu_runs() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/gpu.json"))]


def gpu_tables() -> str:
    """Tabulate what benchmarks/gpu.py measured on each GPU."""
    return "\n\n".join(map(gpu_table, _gpu_runs()))


def home_gpu_tables() -> str:
    """Tabulate the first shape alone: each implementation in its better memory format."""
    return "\n\n".join(map(home_gpu_table, _gpu_runs()))


def home_gpu_table(data: dict[str, Any]) -> str:
    """Select the implementations of our layer's function at the first shape of a run.

    Args:
        data: of its gpu.json.

    Returns:
        A table with the conditions.
    """
    first = data["rows"][0]
    names = {
        "official": "official implementation",
        "official, torch.compile": "the same under `torch.compile`",
        "fully, sdpa cuDNN": "our layer on PyTorch's cuDNN attention",
        "fully, triton": "our layer on `triton`",
    }
    cells = [[title, *_best_gpu_figures(data, name)] for name, title in names.items()]
    shape = "×".join(map(str, first["shape"]))
    headings = [f"{shape}, {first['dtype']}", "forward ms", "peak MiB", "training ms", "peak MiB"]
    return f"{_table(headings, cells)}\n\n{_gpu_conditions(data)}"


def _best_gpu_figures(data: dict[str, Any], name: str) -> list[str]:
    """Format time and peak, forward and training, at the first shape in the better layout."""
    first, line = data["rows"][0], []
    for mode in ("inference", "training"):
        here = [
            row
            for row in data["rows"]
            if (row["implementation"], row["mode"]) == (name, mode)
            and (row["shape"], row["dtype"]) == (first["shape"], first["dtype"])
        ]
        for figure, unit in (("gpu_ms", 1), ("peak_bytes", 2**20)):
            found = [row[figure] for row in here if row[figure] is not None]
            line.append(digits(min(found) / unit) if found else "–")
    return line


def gpu_table(data: dict[str, Any]) -> str:
    """Tabulate one run of benchmarks/gpu.py.

    Args:
        data: of its gpu.json.

    Returns:
        A table for each shape and dtype, and one of the targets, with the conditions.
    """
    parts = []
    rows = [row for row in data.get("rows", []) if row["gpu_ms"] is not None]
    for shape, dtype in dict.fromkeys((tuple(row["shape"]), row["dtype"]) for row in rows):
        here = {
            (row["implementation"], row["memory_format"], row["mode"]): row
            for row in rows
            if (tuple(row["shape"]), row["dtype"]) == (shape, dtype)
        }
        cells = []
        for name in dict.fromkeys(key[:2] for key in here):
            line = list(name)
            for mode in ("inference", "training"):
                row = here.get((*name, mode), {"gpu_ms": None, "peak_bytes": None})
                time, peak = row["gpu_ms"], row["peak_bytes"]
                line.append(f"{time:.4g}" if time is not None else "–")
                line.append(digits(peak / 2**20) if peak is not None else "–")
            cells.append(line)
        headings = ["implementation", "memory format", "forward ms", "peak MiB"]
        headings += ["forward + backward ms", "peak MiB"]
        parts += [f"**{'×'.join(map(str, shape))}, {dtype}**", _table(headings, cells)]
    if targets := data.get("targets"):
        cells = [
            [
                f"{each['what']}, against {each['against']}",
                f"{'≤' if each['less_is_better'] else '≥'} {each['at_least']:g}",
                f"{each['aim']:g}",
                f"{each['reached']:.3g}" if each["reached"] is not None else "–",
            ]
            for each in targets
        ]
        parts.append(_table(["target", "required", "aim", "reached"], cells))
    return "\n\n".join([*parts, _gpu_conditions(data)])


def _gpu_conditions(data: dict[str, Any]) -> str:
    about = data["about"]
    return (
        f"{about['device_name']}, torch {about['torch']}, triton {about['triton']}, driver "
        f"{about['driver']}, {about['date']}; medians."
        + ("" if data.get("checks_passed") else " **Not every check against float64 passed.**")
        + (" **A rehearsal without a GPU: times mean nothing.**" if about["rehearsal"] else "")
    )


TABLES: dict[str, Callable[[], str]] = {
    "readme": readme_table,
    "home": home_table,
    "cpu": cpu_tables,
    "flanet_step": flanet_step_table,
    "camvid": camvid_tables,
    "gpu": gpu_tables,
    "home_gpu": home_gpu_tables,
}


def fill(text: str) -> str:
    """Return a page with each generated part made anew.

    Args:
        text: of the page.

    Returns:
        The text with the tables that the result files give.
    """
    return _PART.sub(lambda part: f"{part[1]}\n{TABLES[part[2]]()}\n\n{part[3]}", text)


def pages() -> list[Path]:
    """List the files that may have generated parts."""
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
