"""Run the core suite on a matrix of versions, one environment at a time: `make versions`.

Each environment is made from nothing, tested and removed. `docs/versions.md` is written from what
ran; a row of an earlier run stays where this run did not come to it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

# What a user of the layers meets: layers × backends × oracle, gradients, options, changes of
# networks, weights, compile and export.
SUITE = (
    "tests/layers",
    "tests/attention",
    "tests/checkpoints",
    "tests/swap/test_swap.py",
    "tests/swap/test_replay.py",
    "tests/export/test_compile.py",
    "tests/test_reshape.py",
)
# Where the packages of the extras are: networks, data, evaluation, pictures and commands.
EXTRAS_SUITE = (
    *("tests/segmentation/models", "tests/segmentation/data", "tests/segmentation/evaluation"),
    *("tests/plot", "tests/cli"),
)
EXTRAS = ("timm", "lightning", "torchmetrics", "pydantic", "pyyaml", "tensorboard")
TOOLS = (
    *("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "safetensors"),
    *("matplotlib>=3.10", "pillow>=11", "rich>=14"),
)


@dataclass(frozen=True)
class Versions:
    """One environment of the matrix."""

    python: str
    torch: str
    numpy: str
    einops: str = "0.8.2"
    torchvision: str | None = None  # with it, the extras too

    def __str__(self) -> str:
        return " ".join(f"{name} {version}" for name, version in asdict(self).items() if version)

    def packages(self) -> list[str]:
        """Return what pip installs, the versions of this row and what the tests need."""
        rows = {name: version for name, version in asdict(self).items() if name != "python"}
        extras = EXTRAS if self.torchvision else ()
        return [*(f"{n}=={version}" for n, version in rows.items() if version), *extras, *TOOLS]

    def suite(self) -> tuple[str, ...]:
        """Return the tests to run."""
        return SUITE + (EXTRAS_SUITE if self.torchvision else ())


MATRIX = (
    Versions("3.10", "2.4.1", "1.26.4", "0.7.0", "0.19.1"),
    Versions("3.11", "2.6.0", "1.26.4"),
    Versions("3.11", "2.8.0", "2.2.6"),
    Versions("3.12", "2.11.0", "2.4.6"),
    Versions("3.11", "2.13.0", "2.4.6"),
    Versions("3.13", "2.14.1", "2.4.6"),
)


def python_of(version: str) -> str | None:
    """Find an interpreter of a version, on the path or among pyenv's."""
    if found := shutil.which(f"python{version}"):
        works = subprocess.run([found, "-c", ""], capture_output=True, check=False)
        if works.returncode == 0:
            return found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return next((str(p) for p in sorted(root.glob(f"versions/{version}.*/bin/python"))), None)


def run(versions: Versions, jobs: int, keep: Path | None) -> dict[str, object]:
    """Make an environment, run the suite in it, and return what came of it."""
    python = python_of(versions.python)
    if python is None:
        return {"outcome": f"no Python {versions.python} on this machine"}
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        place = keep or Path(folder)
        environment = place / f"{versions.python}-{versions.torch}"
        if not environment.exists():
            subprocess.run([python, "-m", "venv", environment], check=True)
            pip = [environment / "bin" / "pip", "install", "--quiet", *versions.packages()]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                shutil.rmtree(environment)
                return {"outcome": f"not installable: {done.stderr.strip().splitlines()[-1]}"}
        start = time.monotonic()
        done = subprocess.run(
            [
                *(environment / "bin" / "python", "-m", "pytest", "-q", "-n", str(jobs)),
                *("-m", "not browser"),
                *("-p", "no:cacheprovider", "-rfE", "--tb=line"),
                *versions.suite(),
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        (place / f"{environment.name}.log").write_text(done.stdout)
        print(done.stdout[-2000:])
        counts = {
            name: int(number)
            for number, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)
        }
        seconds = round(time.monotonic() - start)
        return {"outcome": counts, "seconds": seconds, "failed": failed(done.stdout)}


def failed(output: str) -> list[str]:
    """Return the names of the tests that failed, without their parameters."""
    return sorted(set(re.findall(r"^(?:FAILED|ERROR) tests/\S+?::(\w+)", output, re.MULTILINE)))


def page(results: list[dict[str, object]]) -> str:
    """Write the page of the documentation."""
    lines = [
        "# Versions",
        "",
        "What `make versions` ran, one environment at a time: layers on every backend against the "
        "NumPy oracle, gradients, options, changes of networks, weights of other projects, compile "
        "and export where the version can; where torchvision is named, networks, data, "
        "evaluation, pictures and commands too. On the CPU, Linux, x86-64.",
        "",
        "| Python | torch | numpy | einops | torchvision | passed | failed | skipped | seconds |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in results:
        outcome = row["outcome"]
        names = [row.get(name) or "" for name in Versions.__dataclass_fields__]
        if isinstance(outcome, dict):
            failed = outcome.get("failed", 0) + outcome.get("errors", 0) + outcome.get("error", 0)
            cells = (outcome.get("passed", 0), failed, outcome.get("skipped", 0), row["seconds"])
        else:
            cells = (outcome, "", "", "")
        lines.append(f"| {' | '.join(map(str, (*names, *cells)))} |")
    for row in results:
        if names := row.get("failed"):
            listed = ", ".join(f"`{name}`" for name in names)
            lines += ["", f"On torch {row['torch']} failed: {listed}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the matrix, or the environments whose torch is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("torch", nargs="*", help="versions of torch to run (all)")
    parser.add_argument("--jobs", type=int, default=2, help="test processes (2)")
    parser.add_argument("--keep", type=Path, help="folder that keeps the environments")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    found = {(row["python"], row["torch"]): row for row in known}
    for versions in MATRIX:
        if args.torch and versions.torch not in args.torch:
            continue
        print(f"{versions} …", flush=True)
        found[versions.python, versions.torch] = {
            **asdict(versions),
            **run(versions, args.jobs, args.keep),
        }
        rows = [found[v.python, v.torch] for v in MATRIX if (v.python, v.torch) in found]
        RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
        PAGE.write_text(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
