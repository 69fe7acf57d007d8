"""Register the layers with mmengine, for configs of mmcv and mmsegmentation.

A config selects a layer by a dict, {"type": "FullyAttentional", ...}. mmcv's plugins pass the
channel count as `in_channels`, which is its name in the registered classes. Other arguments and
weights are the layers' own.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from fullattn.layers import LAYERS, AttentionLayer

__all__ = ["register"]


@cache
def _with_in_channels(layer: type[AttentionLayer]) -> type[AttentionLayer]:
    """Make a subclass whose channel count is called `in_channels`, named for mmcv's plugins."""

    def __init__(self: Any, in_channels: int, **options: Any) -> None:  # noqa: N807
        layer.__init__(self, in_channels, **options)

    abbreviation = re.sub(r"(?<!^)(?=[A-Z])", "_", layer.__name__).lower()
    names = {"__init__": __init__, "_abbr_": abbreviation, "__module__": __name__}
    return type(layer.__name__, (layer,), names)


def __getattr__(name: str) -> Any:
    """Return a registered class by name, for pickle."""
    for layer in LAYERS.values():
        if layer.__name__ == name:
            return _with_in_channels(layer)  # type: ignore[arg-type]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Register the layers in `mmengine.registry.MODELS`; repeated calls do nothing.

    Raises:
        ImportError: mmengine is not installed.
        KeyError: one of the names is already registered by another project.

    Example:
        >>> register()  # doctest: +SKIP
        >>> from mmengine.registry import MODELS  # doctest: +SKIP
        >>> MODELS.build({"type": "FullyAttentional", "in_channels": 64})  # doctest: +SKIP
    """
    from mmengine.registry import MODELS

    for layer in LAYERS.values():
        module = _with_in_channels(layer)  # type: ignore[arg-type]
        if MODELS.get(layer.__name__) is not module:
            MODELS.register_module(name=layer.__name__, module=module)
