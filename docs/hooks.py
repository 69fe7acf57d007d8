"""What the site is made of beside its pages: tables and pictures out of measurements, figures.

- `<!-- generated: NAME -->` ... `<!-- end -->` is made anew by benchmarks/tables.py;
- `<!-- figure: NAME -->` becomes a drawing of docs/figures.py;
- tour.md is the notebook as it was run, camvid.md what is written beside the results of CamVid;
- generated/ has the formulas of the cost explorer, the plots of the benchmarks, the similarity maps
  of a photograph with their page, and the picture of the layers, none of which is committed.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]

import explorer  # noqa: E402
import figures  # noqa: E402
import tables  # noqa: E402

PHOTOGRAPH = ROOT / "docs" / "photographs" / "rocket.jpg"
POINT = (318, 170)


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated."""
    made: dict[str, bytes] = {"generated/figures.css": figures.style().encode()}
    made["generated/costs_data.js"] = explorer.script().encode()
    made |= _plots() | _maps() | _notebook() | _experiment()
    for name, content in made.items():
        if old := files.get_file_from_path(name):
            files.remove(old)
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put tables and drawings where a page asks for them."""
    markdown = tables.fill(markdown)
    return re.sub(r"<!-- figure: (\w+) -->", lambda f: figures.FIGURES[f[1]](), markdown)


def _plots() -> dict[str, bytes]:
    from fullattn.bench import chart
    from fullattn.bench.results import read_results

    made = {}
    for path in sorted(tables.RESULTS.glob("*/*.json")):
        if path.name in ("bench.json", "sweep.json"):
            file = io.BytesIO()
            chart.draw(read_results(str(path)), file)
            made[f"generated/{path.parent.name}_{path.stem}.png"] = file.getvalue()
    made["generated/camvid.png"] = (tables.RESULTS / "camvid" / "camvid.png").read_bytes()
    return made


def _maps() -> dict[str, bytes]:
    """Draw what `fullattn maps` writes for the photograph."""
    from fullattn.layers import LAYERS
    from fullattn.segmentation.evaluation import maps

    photograph = maps.read(PHOTOGRAPH, 512)
    seen = maps.of_stem(photograph, list(LAYERS), channels=64, scale=None, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        written = maps.write(seen, photograph, Path(folder), point=POINT, channel=28)
        return {f"generated/{path.name}": path.read_bytes() for path in written}


def _experiment() -> dict[str, bytes]:
    """Make a page of the text beside the results of CamVid."""
    text = (tables.RESULTS / "camvid" / "README.md").read_text()
    for old, new in (
        ("](camvid.png)", "](generated/camvid.png)"),
        ("](table.md)", "](benchmarks.md#does-it-help)"),
    ):
        text = text.replace(old, new)
    return {"camvid.md": text.encode()}


def _notebook() -> dict[str, bytes]:
    """Make a page of the notebook as it was run."""
    path = ROOT / "docs" / "tour.ipynb"
    text, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
    pictures = {f"generated/{name}": data for name, data in resources["outputs"].items()}
    for name in resources["outputs"]:
        text = text.replace(f"]({name})", f"](generated/{name})")
    text += "\n---\n\nThe notebook is `docs/tour.ipynb`; `make test` runs it.\n"
    return {"tour.md": text.encode(), **pictures}
