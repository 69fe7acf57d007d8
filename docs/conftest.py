"""The guides run as tests; a guide to a library that is not there is skipped with the reason."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.networks import NEEDS, load

# Parts of the site's build that import it, where it is not installed.
collect_ignore = [
    file
    for file, library in (("hooks.py", "mkdocs"), ("docstrings.py", "griffe"))
    if importlib.util.find_spec(library) is None
]

# The library that a guide is about, where it is not the guide's own name.
ABOUT = {
    "export": "onnxruntime",
    "flanet": "timm",
    "mmsegmentation": "mmseg",
    "replay": "lightning",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> Iterator[None]:
    name = ABOUT.get(request.path.stem, request.path.stem)
    if name not in NEEDS:
        yield
        return
    load(name)
    logging.disable(logging.INFO)  # mmengine tells of every weight that it initialises
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        yield
    logging.disable(logging.NOTSET)
