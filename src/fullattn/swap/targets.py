"""Which modules of a model are meant, and every place that holds them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

__all__ = ["Holder", "Place", "Target", "find"]

Target: TypeAlias = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, eq=False)
class Holder:
    """One reference to a module within a model.

    Attributes:
        owner: the module that has it.
        attribute: name of the child, or of a plain attribute.
        key: index or key where the attribute is a plain list or dict of modules; None otherwise.
    """

    owner: nn.Module
    attribute: str
    key: Any = None

    def get(self) -> Any:
        """The module that is there now; None if there is none."""
        held = self.owner._modules.get(self.attribute, vars(self.owner).get(self.attribute))
        if self.key is None:
            return held
        try:
            return held[self.key]  # type: ignore[index]
        except (LookupError, TypeError):
            return None

    def put(self, module: nn.Module) -> None:
        """Put another module there."""
        # Not by setattr, which some containers have changed.
        if self.key is not None:
            vars(self.owner)[self.attribute][self.key] = module
        elif self.attribute in self.owner._modules:
            self.owner._modules[self.attribute] = module
        else:
            vars(self.owner)[self.attribute] = module


@dataclass(frozen=True, eq=False)
class Place:
    """A module and everything within the model that refers to it.

    Attributes:
        names: its dotted names; several where it is shared.
        module: the module.
        holders: every reference to it.
    """

    names: tuple[str, ...]
    module: nn.Module
    holders: tuple[Holder, ...]

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def put(self, module: nn.Module) -> None:
        """Put another module into every reference."""
        for holder in self.holders:
            holder.put(module)


def find(model: nn.Module, target: Target, *, outermost: bool) -> list[Place]:
    """The places of a model that a target means, in the model's order.

    Args:
        model: where to look.
        target: a dotted name, a glob over dotted names (`*` also matches dots), a module class, or
            a predicate of name and module.
        outermost: leave out what lies within another match.

    Returns:
        At least one place.

    Raises:
        TypeError: the target is nothing of these.
        ValueError: nothing matches, or only the model itself does.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    means = _meaning(target)
    matched = [module for module, known in names.items() if any(means(n, module) for n in known)]
    chosen = [module for module in matched if module is not model]
    if not chosen:
        raise ValueError(_nothing(model, target, names, is_root=bool(matched) or target == ""))
    if outermost:
        chosen = _outermost(chosen)
    return [Place(tuple(names[m]), m, tuple(_holders(names, m))) for m in chosen]


def _is_glob(target: str) -> bool:
    return any(sign in target for sign in "*?[")


def _meaning(target: Target) -> Callable[[str, nn.Module], bool]:
    if isinstance(target, str):
        if _is_glob(target):
            return lambda name, module: bool(name) and fnmatch.fnmatchcase(name, target)
        return lambda name, module: bool(name) and name == target
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"expected a module class as target, got the class {target.__name__}")
        return lambda name, module: isinstance(module, target)
    if isinstance(target, nn.Module) or not callable(target):
        raise TypeError(
            "expected a target as dotted name, glob, module class or predicate of (name, module), "
            f"got {type(target).__name__}"
        )
    return target


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    inside = {child for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if module not in inside]


def _holders(everything: dict[nn.Module, list[str]], module: nn.Module) -> Iterator[Holder]:
    for owner in everything:
        for attribute, child in owner._modules.items():
            if child is module:
                yield Holder(owner, attribute)
        # Some networks keep their blocks in a plain list as well, and call them from there.
        for attribute, value in vars(owner).items():
            if attribute == "_modules":
                continue
            if value is module:
                yield Holder(owner, attribute)
            elif isinstance(value, list):
                yield from (Holder(owner, attribute, i) for i, v in enumerate(value) if v is module)
            elif isinstance(value, dict):
                yield from (Holder(owner, attribute, k) for k, v in value.items() if v is module)


def _nothing(
    model: nn.Module, target: Target, names: dict[nn.Module, list[str]], *, is_root: bool
) -> str:
    if is_root:
        return (
            f"the target means the model itself ({type(model).__name__}); expected a module within "
            "it. To put a layer behind the whole model: torch.nn.Sequential(model, layer)"
        )
    if isinstance(target, str):
        kind = "glob" if _is_glob(target) else "name"
        known = [name for several in names.values() for name in several if name]
        return f"no module matches the {kind} {target!r}; {_near(target, known)}"
    if isinstance(target, type):
        classes = sorted({type(module).__name__ for module in names if module is not model})
        return f"no module is a {target.__name__}; {_near(target.__name__, classes)}"
    return f"no module of the {len(names) - 1} in {type(model).__name__} satisfies the predicate"


def _near(wanted: str, known: list[str]) -> str:
    """Known names that look like the wanted one, or the first few."""
    if not known:
        return "the model has no modules"
    near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)
    last = wanted.rpartition(".")[2].strip("*?[]")
    near += [name for name in known if last and last in name.split(".") and name not in near]
    if near:
        return f"near: {', '.join(near[:8])}"
    top = list(dict.fromkeys(name.split(".")[0] for name in known))
    return f"there are: {', '.join(top[:12])}{', …' if len(top) > 12 else ''}"
