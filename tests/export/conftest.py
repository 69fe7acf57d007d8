"""Fixtures of the tests of compiled and exported programs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_and_uncompiled() -> Iterator[None]:
    """Seed the weights, and discard compiled code."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
