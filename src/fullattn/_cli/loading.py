"""Import the classes and functions that a command line names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from fullattn._cli.errors import UsageError, describe
from fullattn.integrations.torchvision import ensure_importable
from fullattn.layers import LAYERS, register

__all__ = ["layer_named", "layer_sources", "load_class"]


def layer_named(text: str) -> str:
    """Return the name of a registered layer, importing and registering it if necessary.

    Args:
        text: its name, or where to find a layer that is registered when it is imported:
            "FILE.py:CLASS" or "package.module:CLASS".

    Returns:
        The name.

    Raises:
        UsageError: there is no such layer, or it lacks a part of the protocol.
    """
    if text in LAYERS:
        return text
    if ":" not in text:
        raise UsageError(f"expected layers of {', '.join(LAYERS)}, or FILE.py:CLASS, got {text!r}")
    layer: Any = load_class(text, "layer")
    try:
        return str(register(layer).layer_name)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def layer_sources() -> list[str]:
    """Where other processes find the layers that users have registered, as "FILE.py:CLASS"."""
    sources = []
    for layer in LAYERS.values():
        with suppress(OSError, TypeError):  # one of a notebook has no file
            if not layer.__module__.startswith("fullattn."):
                sources.append(f"{inspect.getfile(layer)}:{layer.__name__}")
    return sources


def load_class(target: str, what: str = "module") -> Callable[..., nn.Module]:
    """Import a user's class or function.

    Args:
        target: "FILE.py:CLASS" or "package.module:CLASS"; modules are also looked for in the
            current folder.
        what: what it is for, in messages.

    Returns:
        The class, or any other callable.

    Raises:
        UsageError: the file, the module or the class is not there, or importing it failed.
    """
    place, colon, name = target.rpartition(":")
    if not (place and colon and name):
        raise UsageError(
            f"expected a {what} as FILE.py:NAME or package.module:NAME, got {target!r}"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise UsageError(f"expected a file at {place!r} for {what} {target!r}, found none")
    try:
        module = _import(place)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} {target!r} does not import: {describe(error)}") from error
    factory = getattr(module, name, None)
    if factory is None:
        raise UsageError(f"expected {name!r} in {place!r}, found nothing of that name")
    if not callable(factory):
        raise UsageError(f"expected {target!r} to be callable, got {type(factory).__name__}")
    loaded: Callable[..., nn.Module] = factory
    return loaded


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        ensure_importable()  # for models of torchvision, timm, segmentation-models-pytorch
        return importlib.import_module(place)
    path = Path(place).resolve()
    name = f"fullattn_module_{abs(hash(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{place} is not a Python source file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
