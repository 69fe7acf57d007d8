"""Hypothesis profiles: `ci` for every run, `deep` (HYPOTHESIS_PROFILE=deep) for a long look."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from fullattn.attention import reference
from fullattn.attention.dispatch import BACKENDS

# The same examples in every run, so that a red build is red again when somebody looks into it.
# `deep` draws new ones each time.
settings.register_profile(
    "ci", max_examples=12, deadline=None, derandomize=True, print_blob=True, database=None
)
settings.register_profile(
    "deep",
    max_examples=200,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The frameworks' modules are millions of objects, which need not be looked through again and again.
gc.set_threshold(50_000, 20, 50)

# cuDNN convolutions are TF32 by default, which would be judged by float32's tolerance here.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that run while a test does, in order."""
    names: list[str] = []

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            names.append(name)
            return run(*arguments)

        return noted

    for backend in BACKENDS:
        for functions in (backend.attend, backend.operations):
            for what, run in functions.items():
                monkeypatch.setitem(functions, what, noting(backend.name, run))
    monkeypatch.setattr(reference, "attended", noting("reference", reference.attended))
    return names


# `make networks`: what became of every test of every network, as a table for the documentation.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--networks-table", metavar="FILE", help="write the table of networks there")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--networks-table"):
        config.pluginmanager.register(NetworksTable(Path(path)))


class NetworksTable:
    """Collects the outcomes of tests/integrations/test_networks.py by network and test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file, _, rest = report.nodeid.partition("::")
        test, bracket, network = rest.rstrip("]").partition("[")
        if not (file.endswith("test_networks.py") and bracket):
            return
        if report.when == "call" or report.outcome != "passed":
            self.cells.setdefault(network, {})[test] = self._cell(report)

    @staticmethod
    def _cell(report: pytest.TestReport) -> str:
        if report.outcome == "passed":
            return "✓"
        if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
            return report.longrepr[2].removeprefix("Skipped: ")
        reason = getattr(report, "wasxfail", "")
        return reason or "fails"

    def pytest_terminal_summary(self) -> None:
        from helpers.networks import NETWORKS, table

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(table([network.name for network in NETWORKS], self.cells))
