"""The notebook runs from top to bottom, in time, and shows what is committed in it."""

from __future__ import annotations

import copy
import importlib.util
import re
import time
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
SECONDS = 180

nbformat = pytest.importorskip("nbformat", reason="needs nbformat")


def _read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _shown(cell: Any) -> list[str]:
    """What a cell shows in words: what it printed, tables, and that there is a picture."""
    shown = []
    for output in cell.outputs:
        if output.output_type == "stream":
            assert output.name == "stdout", output.text
            shown.append(output.text)
        else:
            data = output["data"]
            shown += [str(data[kind]) for kind in ("text/markdown",) if kind in data]
            shown += ["a picture"] if "image/png" in data else []
    return shown


def _differences(committed: Any, run: Any) -> list[str]:
    """The cells that show something else; of timings alone that they show something."""
    differences = []
    for old, new in zip(_code(committed), _code(run), strict=True):
        if "timing" in old.metadata.get("tags", []):
            assert _shown(new)
        elif _shown(old) != _shown(new):
            differences.append(f"{old.source}\n-- {_shown(old)}\n++ {_shown(new)}")
    return differences


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_is_in_it() -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    if importlib.util.find_spec("torchvision") is None:  # it may need a cure before its import
        pytest.skip("needs torchvision")
    committed = _read()
    run = copy.deepcopy(committed)
    start = time.monotonic()
    nbclient.NotebookClient(
        run,
        timeout=SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    ).execute()
    assert time.monotonic() - start < SECONDS
    assert _differences(committed, run) == []


def test_a_changed_output_is_noticed() -> None:
    committed, run = _read(), _read()
    assert _differences(committed, run) == []
    (cell,) = [cell for cell in _code(run) if "report = fullattn.insert" in cell.source]
    cell.outputs[0].text = cell.outputs[0].text.replace("128", "129", 1)
    assert len(_differences(committed, run)) == 1


def test_the_notebook_is_committed_as_it_ran() -> None:
    notebook = _read()
    assert [cell.execution_count for cell in _code(notebook)] == [
        number + 1 for number in range(len(_code(notebook)))
    ]
    pictures = [cell for cell in _code(notebook) if "figure" in cell.metadata.get("tags", [])]
    assert len(pictures) == 3
    for cell in pictures:
        assert _shown(cell) == ["a picture"]
    assert "timing" in " ".join(tag for c in _code(notebook) for tag in c.metadata.get("tags", []))
    assert NOTEBOOK.stat().st_size < 2**20
    # No path of the machine that it was run on, and nothing from elsewhere.
    words = re.sub(r'"image/png": "[^"]*"', "", NOTEBOOK.read_text())
    assert not re.search(r"/(root|home|tmp|work|usr)/|https?://", words)
