"""`benchmarks/gpu.py` and `gpu_sweep.py` rehearsed: what runs on a GPU runs where there is none."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import tables
from fullattn.attention import triton
from fullattn.attention.triton import configurations
from helpers import ROOT
from helpers.processes import run_program

SCRIPTS = ROOT / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(triton._missing() is not None, reason=str(triton._missing())),
]


def python(script: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a script of the benchmarks, after some lines."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return run_program(
        f"import runpy, sys\n{before}\nsys.argv[0] = {script!r}\n"
        f"runpy.run_path({script!r}, run_name='__main__')",
        *arguments,
        setup="import torch, matplotlib.pyplot, PIL.Image",
        cwd=SCRIPTS,
        env=plain | {"PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent / "src")])},
    )


def test_rehearsal_checks_and_times_every_implementation(tmp_path: Path) -> None:
    done = python("gpu.py", "--rehearse", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert report["about"]["rehearsal"] is True
    assert report["checks_passed"] is True
    layouts = {"contiguous", "channels_last", "sliced", "channels_last, scores of 1e6", "means"}
    assert {check["layout"] for check in report["checks"]} == layouts
    rows = {(r["implementation"], r["memory_format"], r["mode"]): r for r in report["rows"]}
    assert len(rows) == len(report["rows"])
    # The official block is compiled for one of the two formats.
    assert len(rows) == 2 * (10 + 9)
    text = tables.gpu_table(report)
    for (name, _, _), row in rows.items():
        assert row["gpu_ms"] is not None, name  # on a CPU `sdpa` has one kernel
        assert (row["reason"] is None) == (row["gpu_ms"] is not None)
        assert row["peak_bytes"] is None
        assert (f"| {name} |" in text) == (row["gpu_ms"] is not None)
    # As many FLOPs for the same function, whoever computes it; and backward twice the forward.
    flops = {
        mode: rows["fully, triton", "channels_last", mode]["useful_flops"]
        for mode in ("inference", "training")
    }
    assert flops["training"] == 3 * flops["inference"]
    assert rows["official", "channels_last", "inference"]["useful_flops"] == flops["inference"]
    assert all(target["reached"] is None for target in report["targets"])
    assert (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"


def test_only_what_is_named_is_timed(tmp_path: Path) -> None:
    done = python(
        *("gpu.py", "--rehearse", "--output", str(tmp_path)),
        *("--shapes", "1x3x2x4", "--implementations", "channel"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    found = {(tuple(row["shape"]), row["implementation"]) for row in report["rows"]}
    assert found == {((1, 3, 2, 4), "channel, built"), ((1, 3, 2, 4), "channel, fused")}


def test_nothing_is_timed_if_a_kernel_is_wrong(tmp_path: Path) -> None:
    arguments = ("--rehearse", "--output", str(tmp_path))
    # `--rehearse` has to be among the arguments before anything is imported.
    impossible = "import os; os.environ['TRITON_INTERPRET'] = '1'; import gpu_checks\n"
    impossible += "gpu_checks.TOLERANCE = dict.fromkeys(gpu_checks.TOLERANCE, -1.0)"
    done = python("gpu.py", *arguments, before=impossible)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nothing is timed" in done.stdout
    assert "rows" not in json.loads((tmp_path / "gpu.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "gpu_sweep.py"])
def test_without_a_gpu_it_says_so(script: str, tmp_path: Path) -> None:
    done = python(script, "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", ["8x512x96", "axbxcxd", "1x0x2x3"])
def test_a_wrong_shape_is_one_sentence(shape: str, tmp_path: Path) -> None:
    done = python("gpu.py", "--output", str(tmp_path), "--shapes", shape)
    assert done.returncode == 2
    assert f"invalid shape value: '{shape}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep_becomes_the_order_of_the_configurations(tmp_path: Path) -> None:
    results, table = tmp_path / "sweep.json", tmp_path / "configurations.json"
    done = python("gpu_sweep.py", "--rehearse", "--output", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(results.read_text())["rows"]
    assert {row["kernel"] for row in rows} == {"forward", "backward_queries", "backward_keys"}
    assert all(row["reason"] is None and row["error"] < 1e-5 for row in rows)
    slow, fast = dict(rows[0]), dict(rows[0])
    slow |= {"milliseconds": 3.0}
    fast |= {"milliseconds": 1.0, "configuration": slow["configuration"] | {"stages": 5}}
    results.write_text(json.dumps({"rows": [slow, fast]}))
    table.write_text((Path(configurations.__file__).parent / "configurations.json").read_text())
    done = python("gpu_sweep.py", "--take", str(results), "--table", str(table))
    assert done.returncode == 0, done.stderr
    taken = json.loads(table.read_text())["Hopper"]["half"][slow["kernel"]]["16"]
    assert [entry["stages"] for entry in taken] == [5, slow["configuration"]["stages"]]
