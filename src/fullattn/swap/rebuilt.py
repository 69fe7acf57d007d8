"""Networks that their framework builds again from a description, without what was inserted.

Changes are noted in the description, and the framework's integration makes them again. It is
imported where the framework is, and has

    description(model)                   the Description of a network of the framework, or None

and may have

    check_change(model, sites, action)   raises ValueError if the framework would break the change
    replace(old, new)                    gives a replacement what the framework reads from a module
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from fullattn.swap.targets import Site

if TYPE_CHECKING:
    from fullattn.swap.report import Report

__all__ = ["Description", "check", "forget", "keep", "replace"]

_FRAMEWORKS = ("segmentation_models_pytorch", "transformers", "ultralytics")


@dataclass(frozen=True)
class Description:
    """What a framework builds a network from, as far as changes are concerned.

    Attributes:
        changes: records of the changes so far; part of the description.
        prefix: start of the names of all modules that the description describes.
        warning: what to warn of when a change is noted; None for nothing.
    """

    changes: list[dict[str, Any]]
    prefix: str = ""
    warning: str | None = None


def _integrations() -> Iterator[Any]:
    for name in _FRAMEWORKS:
        if name in sys.modules:
            yield import_module(f"fullattn.integrations.{name}")


def check(model: nn.Module, sites: Sequence[Site], action: Literal["swap", "insert"]) -> None:
    """Raise ValueError if a framework's own code would break a change."""
    for integration in _integrations():
        if hasattr(integration, "check_change"):
            integration.check_change(model, sites, action)


def replace(old: nn.Module, new: nn.Module) -> None:
    """Give a replacement the attributes that a framework reads from the module."""
    for integration in _integrations():
        if hasattr(integration, "replace"):
            integration.replace(old, new)


def keep(report: Report) -> None:
    """Note a change in the description from which the framework builds the network."""
    for description in _descriptions(report.model):
        try:
            record = report.to_dict()
        except ValueError as error:
            warnings.warn(
                f"{error}; the change is lost when {type(report.model).__name__} is built again",
                stacklevel=4,
            )
            continue
        for at in record["at"]:
            at["name"] = at["name"].removeprefix(description.prefix)
        description.changes.append(record)
        report.kept = record
        if description.warning is not None:
            warnings.warn(description.warning, stacklevel=4)


def forget(report: Report) -> None:
    """Take a change that was undone out of the description."""
    for description in _descriptions(report.model):
        if report.kept in description.changes:
            description.changes.remove(report.kept)


def _descriptions(model: nn.Module) -> Iterator[Description]:
    if _is_in_its_constructor(model):
        return  # the class makes the change itself, whenever it is built
    for integration in _integrations():
        description = integration.description(model)
        if description is not None:
            yield description


def _is_in_its_constructor(model: nn.Module) -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and frame.f_locals.get(code.co_varnames[0]) is model:
            return True
        frame = frame.f_back
    return False
