"""`benchmarks/gpu.py` rehearsed: the script that measures on a GPU runs where there is none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tables
from fullattn.attention import triton

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.slow


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=plain | {"PYTHONPATH": str(SCRIPT.parents[1] / "src")},
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(triton._missing() is not None, reason=str(triton._missing()))
def test_rehearsal_checks_and_times_every_contender(tmp_path: Path) -> None:
    done = python(str(SCRIPT), "--rehearse", "--output", str(tmp_path), "--dtypes", "float16")
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert report["about"]["rehearsal"] is True
    assert report["checks_passed"] is True
    text = tables.gpu_table(report)
    assert {row["contender"] for row in report["rows"]} <= set(
        re.findall(r"^\| ([^|]+) \|", text, re.M)
    )
    assert {check["layout"] for check in report["checks"]} == {
        "contiguous",
        "channels_last",
        "sliced",
    }
    rows = {(row["contender"], row["mode"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 12 * 2
    for (contender, _), row in rows.items():
        # cuDNN and the memory-efficient kernel are CUDA's; everything else runs.
        assert (row["median"] is None) == ("cuDNN" in contender or "efficient" in contender)
        assert (row["reason"] is None) == (row["median"] is not None)
        assert row["peak_bytes"] is None
    # As many FLOPs for the same function, whoever computes it; and backward twice the forward.
    flops = {
        mode: rows["fully, triton", mode]["useful_flops"] for mode in ("inference", "training")
    }
    assert flops["training"] == 3 * flops["inference"]
    assert rows["official implementation", "inference"]["useful_flops"] == flops["inference"]
    assert (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(triton._missing() is not None, reason=str(triton._missing()))
def test_nothing_is_timed_if_a_kernel_is_wrong(tmp_path: Path) -> None:
    program = (
        "import sys; import gpu; sys.argv = sys.argv[:1] + sys.argv[2:];"
        "gpu.TOLERANCE = dict.fromkeys(gpu.TOLERANCE, -1.0); sys.exit(gpu.main())"
    )
    done = python(
        "-c", program, "-", "--rehearse", "--output", str(tmp_path), "--dtypes", "float32"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nothing is timed" in done.stdout
    assert "rows" not in json.loads((tmp_path / "gpu.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = python(str(SCRIPT), "--output", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
