"""Hypothesis profiles: `ci` for every run, `deep` (HYPOTHESIS_PROFILE=deep) for a long look."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

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
        for kind, run in backend.run.items():
            monkeypatch.setitem(backend.run, kind, noting(backend.name, run))
    return names
