"""Every tool with every layer, as docs/tools.md says."""

from __future__ import annotations

from typing import Any

import pytest

from fullattn.integrations.torchvision import ensure_importable
from helpers import ROOT
from helpers.tools import LAYERS, TOOLS, Tool, page

ensure_importable()


def cells() -> list[Any]:
    """One test for each cell of the page."""
    return [
        pytest.param(tool, layer, id=f"{tool.check.__name__}-{layer}", marks=marks)
        for tool in TOOLS
        for marks in [[pytest.mark.slow] if tool.slow else []]
        for layer in LAYERS
    ]


@pytest.mark.parametrize(("tool", "layer"), cells())
@pytest.mark.filterwarnings("ignore")  # the tools' own
def test_the_tool_works_with_the_layer(tool: Tool, layer: str) -> None:
    for package in tool.needs:
        pytest.importorskip(package)
    tool.check(layer)


def test_the_page_has_every_tool_and_layer() -> None:
    assert (ROOT / "docs" / "tools.md").read_text(encoding="utf-8") == page(), "run `make tables`"
    assert len(TOOLS) >= 25
