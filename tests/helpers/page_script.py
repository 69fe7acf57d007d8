"""The page of similarity maps: the data in it, and its script in V8."""

from __future__ import annotations

import base64
import json
import re
from importlib import resources
from typing import Any

import numpy as np
import pytest


def page_data(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return dict(json.loads(found))


def page_tensor(data: dict[str, Any], number: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(data["tensors"][number]), "<f4")


class PageScript:
    """The page's own functions, in V8."""

    def __init__(self) -> None:
        racer = pytest.importorskip(
            "py_mini_racer", reason="needs mini-racer: a V8 to run scripts in"
        )
        self.context = racer.MiniRacer()
        self.context.eval(resources.files("fullattn.plot").joinpath("maps.js").read_text())

    def call(self, function: str, *arguments: Any) -> Any:
        given = ", ".join(map(json.dumps, arguments))
        out = self.context.eval(
            f"(() => {{ const made = fullattnMaps.{function}({given});"
            "return JSON.stringify(made.length ? Array.from(made) : made) })()"
        )
        return json.loads(out)


def position_tokens(data: Any, described: Any, branch: Any) -> dict[str, Any]:
    return {
        "query": page_tensor(data, branch["query"]).tolist(),
        "key": page_tensor(data, branch["key"]).tolist(),
        "features": branch["tokenFeatures"],
        "factor": described["factor"],
        "score": described["score"],
        "width": described["width"],
        "keyWidth": branch["keyWidth"],
        "within": branch["within"],
    }
