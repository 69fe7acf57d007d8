"""The layers under their names in mmengine's registry, for configs of mmcv and mmsegmentation.

A config names a layer as a dict, {"type": "FullyAttentional", ...}. mmcv's plugins give it the
channel count as `in_channels`, so that is what the registered classes call it; everything else is
as in the layers, and so are the weights.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from fullattn.layers import LAYERS, AttentionLayer

__all__ = ["register"]


@cache
def _with_in_channels(layer: type[AttentionLayer]) -> type[AttentionLayer]:
    """The layer with its channel count called `in_channels`, and a name for mmcv's plugins."""

    def __init__(self: Any, in_channels: int, **options: Any) -> None:  # noqa: N807
        layer.__init__(self, in_channels, **options)

    abbreviation = re.sub(r"(?<!^)(?=[A-Z])", "_", layer.__name__).lower()
    names = {"__init__": __init__, "_abbr_": abbreviation, "__module__": __name__}
    return type(layer.__name__, (layer,), names)


def __getattr__(name: str) -> Any:
    """The registered class of a layer, where pickle looks for it."""
    for layer in LAYERS.values():
        if layer.__name__ == name:
            return _with_in_channels(layer)  # type: ignore[arg-type]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Register the layers in `mmengine.registry.MODELS`; nothing happens a second time.

    Raises:
        ImportError: mmengine is not installed.
        KeyError: another project has registered something under one of the names.

    Example:
        >>> register()  # doctest: +SKIP
        >>> from mmengine.registry import MODELS  # doctest: +SKIP
        >>> MODELS.build({"type": "FullyAttentional", "in_channels": 64})  # doctest: +SKIP
    """
    from mmengine.registry import MODELS

    for layer in LAYERS.values():
        made = _with_in_channels(layer)  # type: ignore[arg-type]
        if MODELS.get(layer.__name__) is not made:
            MODELS.register_module(name=layer.__name__, module=made)
