"""The pair that replaces a module when a layer is inserted after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["Inserted"]


class Inserted(nn.Module):
    """A module followed by a layer.

    Attributes, items and length are the module's, for code that inspects the model.

    Args:
        module: the module.
        layer: called with the module's result.

    Shape:
        input: the module's input.
        output: the module's output.

    Example:
        >>> from torch import nn
        >>> pair = Inserted(nn.Conv2d(3, 8, 1), nn.Identity())
        >>> pair.out_channels
        8
    """

    def __init__(self, module: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.layer = layer
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, then the layer on its result."""
        return self.layer(self.module(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # `_modules` is missing while the pair is unpickled or copied.
            modules = self.__dict__.get("_modules", {})
            if "module" not in modules:
                raise
            return getattr(modules["module"], name)

    def __getitem__(self, key: Any) -> Any:
        return self.module[key]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.module)  # type: ignore[no-any-return, call-overload]

    def __len__(self) -> int:
        return len(self.module)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return bool(self.module)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Accept weights that were saved before the insertion.
        given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if given and given <= set(self.module.state_dict()) and not given <= set(self.state_dict()):
            for key in given:
                state_dict[f"{prefix}module.{key}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
