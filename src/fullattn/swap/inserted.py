"""A layer inserted after a module: a child of the module, called with the module's result."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import reduce
from itertools import count
from typing import Any

from torch import nn

from fullattn._versions import reset_compiler

__all__ = ["Home", "InsertedLayer", "Insertion"]


@dataclass(frozen=True)
class Home:
    """Where an inserted layer is registered.

    Attributes:
        path: names that lead from the module to the one whose child the layer becomes; none for
            the module itself.
        hooked: whether a forward hook of the module calls the layer. It does not where the module
            calls its children in order, as `nn.Sequential` does.
    """

    path: tuple[str, ...] = ()
    hooked: bool = True

    def within(self, module: nn.Module) -> nn.Module:
        """Return the module whose child the layer becomes."""
        return reduce(getattr, self.path, module)


@dataclass(frozen=True, eq=False)
class InsertedLayer:
    """Forward hook of a module: call the layer that was inserted after it.

    The layer is looked up in the module that is called, which may be a copy or a replica.

    Attributes:
        path: names that lead from the module to the layer.
    """

    path: tuple[str, ...]

    def __call__(self, module: nn.Module, args: Any, result: Any) -> Any:
        """Return the layer's result for the module's."""
        return reduce(getattr, self.path, module)(result)


@dataclass(eq=False)
class Insertion:
    """A layer and the module after which it is inserted.

    Attributes:
        module: the module; it stays in its place, under its name.
        layer: called with the module's result.
        home: where the layer is registered.
        name: of the layer in its home, while it is attached.
        hook: the module's forward hook that calls the layer, if the module does not.
    """

    module: nn.Module
    layer: nn.Module
    home: Home
    name: str = ""
    hook: InsertedLayer | None = None

    @property
    def path(self) -> tuple[str, ...]:
        """Names that lead from the module to the layer."""
        return (*self.home.path, self.name)

    @property
    def attached(self) -> bool:
        """Whether the layer is in its home, and called."""
        children = self.home.within(self.module)._modules
        hooks = self.module._forward_hooks.values()
        return children.get(self.name) is self.layer and (
            not self.home.hooked or any(hook is self.hook for hook in hooks)
        )

    def attach(self) -> None:
        """Register the layer under a free name, and the hook that calls it."""
        home = self.home.within(self.module)
        given = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self.layer).__name__).lower()
        names = (f"{given}_{number}" if number > 1 else given for number in count(1))
        self.name = next(name for name in names if not hasattr(home, name))
        home.add_module(self.name, self.layer)
        if self.home.hooked:
            self.hook = InsertedLayer(self.path)
            self.module.register_forward_hook(self.hook)
        reset_compiler()  # its guards do not see hooks, nor new children in PyTorch 2.4

    def detach(self) -> None:
        """Take the layer and its hook away."""
        del self.home.within(self.module)._modules[self.name]
        hooks = self.module._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is self.hook]:
            del hooks[key]
        reset_compiler()
