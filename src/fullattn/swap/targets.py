"""Find the modules that a target selects, and every reference to them within the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any, TypeAlias

from torch import nn

from fullattn._text import did_you_mean

__all__ = ["Reference", "Site", "Target", "find"]

Target: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, eq=False)
class Reference:
    """One reference to a module within a model.

    Attributes:
        owner: the module that holds the reference.
        path: keys that lead to it from `vars(owner)`: ("_modules", "conv") for a submodule,
            ("blocks", 2) for an item of a plain list.
    """

    owner: nn.Module
    path: tuple[Any, ...]

    def get(self) -> Any:
        """Return the current value; None if the path no longer exists."""
        try:
            return reduce(getitem, self.path, vars(self.owner))
        except (LookupError, TypeError):
            return None

    def set(self, module: nn.Module) -> None:
        """Replace the value. Containers may override `setattr`, so it is not used."""
        container: Any = reduce(getitem, self.path[:-1], vars(self.owner))
        container[self.path[-1]] = module


@dataclass(frozen=True, eq=False)
class Site:
    """A module and all references to it within a model.

    Attributes:
        names: its dotted names; several if it is shared.
        module: the module.
        references: every reference to it.
    """

    names: tuple[str, ...]
    module: nn.Module
    references: tuple[Reference, ...]

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    def set(self, module: nn.Module) -> None:
        """Set every reference to another module."""
        for reference in self.references:
            reference.set(module)


def find(model: nn.Module, target: Target, *, outermost: bool) -> list[Site]:
    """Find the modules that a target selects, in the model's order; at least one.

    With `outermost`, modules inside another match are left out.

    Raises:
        TypeError: the target is not a target.
        ValueError: nothing matches, or only the model itself.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    matches = _predicate(target)
    found = [module for module, known in names.items() if any(matches(n, module) for n in known)]
    if found == [model] or target == "":
        raise ValueError(
            f"the target is the model itself ({type(model).__name__}); expected a module within "
            "it; to append a layer, use torch.nn.Sequential(model, layer)"
        )
    found = [module for module in found if module is not model]
    if not found:
        raise ValueError(_no_match(target, names))
    if outermost:
        inside = {child for module in found for child in module.modules() if child is not module}
        found = [module for module in found if module not in inside]
    return [Site(tuple(names[m]), m, tuple(_references(names, m))) for m in found]


def _predicate(target: Target) -> Callable[[str, nn.Module], bool]:
    if isinstance(target, str):
        return lambda name, _: bool(name) and (name == target or fnmatch.fnmatchcase(name, target))
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"expected a module class as target, got the class {target.__name__}")
        return lambda _, module: isinstance(module, target)
    if isinstance(target, nn.Module) or not callable(target):
        raise TypeError(
            "expected a target as dotted name, glob, module class or predicate of (name, module), "
            f"got {type(target).__name__}"
        )
    return target


def _references(owners: dict[nn.Module, list[str]], module: nn.Module) -> Iterator[Reference]:
    # Submodules are in the dict `_modules`; some networks also call blocks from a plain list.
    for owner in owners:
        for attribute, value in vars(owner).items():
            if value is module:
                yield Reference(owner, (attribute,))
            elif isinstance(value, (list, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from (Reference(owner, (attribute, key)) for key, v in items if v is module)


def _no_match(target: Target, names: dict[nn.Module, list[str]]) -> str:
    model, *modules = names
    if isinstance(target, str):
        kind = "glob" if any(sign in target for sign in "*?[") else "name"
        message, wanted = f"no module matches the {kind} {target!r}", target
        known = [name for module in modules for name in names[module]]
        listed = [name for name, _ in model.named_children()]  # there may be hundreds of names
    elif isinstance(target, type):
        message, wanted = f"no module is a {target.__name__}", target.__name__
        known = listed = sorted({type(module).__name__ for module in modules})
    else:
        return f"no module of the {len(modules)} in {type(model).__name__} satisfies the predicate"
    return message + (did_you_mean(wanted, known) or f"; known are {', '.join(listed) or 'none'}")
