"""Figures in README and documentation are those of the result files, and nobody typed them."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from xml.etree import ElementTree

import pytest

import figures
import tables
from helpers import ROOT


@pytest.mark.parametrize("path", tables.pages(), ids=lambda path: path.name)
def test_every_table_is_what_the_result_files_give(path: Path) -> None:
    text = path.read_text()
    opened = re.findall(r"<!-- generated: (\w+) -->", text)
    assert len(opened) == text.count("<!-- end -->")
    assert set(opened) <= tables.TABLES.keys()
    assert tables.fill(text) == text, "run `make tables`"


def test_every_table_is_on_a_page() -> None:
    texts = "".join(path.read_text() for path in tables.pages())
    for name in tables.TABLES:
        assert f"<!-- generated: {name} -->" in texts


def test_a_figure_that_was_typed_is_noticed() -> None:
    text = (ROOT / "README.md").read_text()
    changed = re.sub(r"\| 614 \|", "| 613 |", text)
    assert changed != text
    assert tables.fill(changed) == text


def test_the_tables_hold_the_medians_and_ratios_of_the_times() -> None:
    data = json.loads((tables.RESULTS / "cpu" / "bench.json").read_text())
    rows = [
        line.split(" | ") for line in tables.cpu_tables().splitlines() if line.startswith("| `")
    ]
    named = {("fully", "native"): "`FullyAttentional` (native)"}
    for (layer, backend), name in named.items():
        found = [row for row in rows if row[0] == f"| {name}"]
        expected = [
            row
            for row in data["rows"]
            if (row["implementation"]["layer"], row["implementation"]["backend"])
            == (layer, backend)
        ]
        assert len(found) == len(expected) > 0
        for shown, row in zip(found, expected, strict=True):
            public = next(
                r for r in data["rows"] if r["shape"] == row["shape"] and r["name"] == "official"
            )
            median = statistics.median(row["inference"]["times_ms"])
            base = statistics.median(public["inference"]["times_ms"])
            assert float(shown[1]) == pytest.approx(median, rel=0.005)
            assert float(shown[2].rstrip("×")) == pytest.approx(base / median, abs=0.006)
            peak = row["inference"]["peak_bytes"] / 2**20
            assert float(shown[3]) == pytest.approx(peak, rel=0.005)


def test_every_table_names_device_and_versions() -> None:
    files = (tables.RESULTS / "cpu").glob("*.json")
    read = [json.loads(path.read_text()) for path in files]
    devices = {
        data["environment"]["device_name"] if "rows" in data else data["device"] for data in read
    }
    for name, make in tables.TABLES.items():
        if name in ("camvid", "gpu", "home_gpu"):  # told beside them, or of another device
            continue
        text = make()
        assert any(device in text for device in devices), name
        assert re.search(r"(torch|PyTorch) 2\.\d+", text), name
        assert "threads" in text, name


def test_a_run_on_a_gpu_becomes_a_table() -> None:
    row = {"shape": [8, 512, 96, 96], "dtype": "bfloat16", "peak_bytes": 3 * 2**20}
    official = row | {"implementation": "official", "memory_format": "channels_last"}
    ours = row | {"implementation": "fully, triton", "memory_format": "contiguous"}
    target = {"what": "forward", "against": "b", "at_least": 4, "aim": 5, "reached": 6.034}
    data = {
        "about": {
            "device_name": "GPU",
            "torch": "2.11",
            "triton": "3.6",
            "driver": "1",
            "date": "2026-11-25",
            "rehearsal": False,
        },
        "rows": [
            official | {"mode": "inference", "gpu_ms": 2.0},
            official | {"mode": "training", "gpu_ms": None, "peak_bytes": None},
            ours | {"mode": "training", "gpu_ms": 4.0},
            ours | {"mode": "training", "gpu_ms": 3.5, "memory_format": "channels_last"},
            ours | {"mode": "inference", "gpu_ms": None, "shape": [1, 2, 3, 4]},
        ],
        "targets": [
            target | {"less_is_better": False},
            target | {"less_is_better": True, "reached": None},
        ],
        "checks_passed": True,
    }
    text = tables.gpu_table(data)
    assert "| official | channels_last | 2 | 3.00 | – | – |" in text
    assert "| fully, triton | contiguous | – | – | 4 | 3.00 |" in text
    assert "| forward, against b | ≥ 4 | 5 | 6.03 |" in text
    assert "| forward, against b | ≤ 4 | 5 | – |" in text
    assert "8×512×96×96, bfloat16" in text
    assert "1×2×3×4" not in text  # nothing was measured there
    assert "GPU, torch 2.11, triton 3.6, driver 1" in text
    assert "ehearsal" not in text
    assert "passed" not in text
    short = tables.home_gpu_table(data)
    assert "| our layer on `triton` | – | – | 3.50 | 3.00 |" in short
    assert "GPU, torch 2.11, triton 3.6, driver 1" in short
    assert "Not every check" in tables.gpu_table(data | {"checks_passed": False})
    data["about"]["rehearsal"] = True
    assert "times mean nothing" in tables.gpu_table(data)


def test_the_readmes_picture_is_that_of_the_site() -> None:
    text = (ROOT / "docs" / "layers.svg").read_text()
    assert text == figures.standalone(), "write it with `make tables`"
    words = {text for text in ElementTree.fromstring(text).itertext() if text.strip()}
    assert {"ChannelNonLocal", "SpatialNonLocal", "FullyAttentional"} <= words
    assert {"C × H × W and its means", "key", "sums inside a column or a row"} <= words


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_whole_and_has_a_title(name: str) -> None:
    drawn = ElementTree.fromstring(figures.FIGURES[name]())
    svgs = drawn.findall(".//{http://www.w3.org/2000/svg}svg")
    assert len(svgs) == 3
    for svg in svgs:
        assert svg.find("{http://www.w3.org/2000/svg}title") is not None
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for box in svg.iter("{http://www.w3.org/2000/svg}rect"):
            x, y, w, h = (float(box.attrib[side]) for side in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width
            assert 0 <= y <= y + h <= height
