"""The pair that takes a module's place when a layer is inserted behind it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["Inserted"]


class Inserted(nn.Module):
    """A module with a layer behind it.

    To code that looks into a model it is still that module: attributes, items and length are its.

    Args:
        module: the module.
        layer: called with the module's result.

    Shape:
        input: whatever the module takes.
        output: as the module's.

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
            # While it is unpickled or copied it has no modules yet.
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
        # Weights of the model as it was before the layer came.
        given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        if given and given <= set(self.module.state_dict()) and not given <= set(self.state_dict()):
            for key in given:
                state_dict[f"{prefix}module.{key}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
