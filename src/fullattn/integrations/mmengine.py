"""The layers under their names in mmengine's registry, for configs of mmcv and mmsegmentation.

A config names a layer as a dict, {"type": "FullyAttentional", ...}. mmcv's plugins give it the
channel count as `in_channels`, so that is what the registered classes call it; everything else is
as in the layers, and so are the weights.
"""

from __future__ import annotations

from typing import Any

from fullattn.layers import ChannelNonLocal, FullyAttentional, SpatialNonLocal

__all__ = ["register"]


class _FullyAttentional(FullyAttentional):
    _abbr_ = "fully_attentional"

    def __init__(self, in_channels: int, **options: Any) -> None:
        super().__init__(in_channels, **options)


class _ChannelNonLocal(ChannelNonLocal):
    _abbr_ = "channel_non_local"

    def __init__(self, in_channels: int, **options: Any) -> None:
        super().__init__(in_channels, **options)


class _SpatialNonLocal(SpatialNonLocal):
    _abbr_ = "spatial_non_local"

    def __init__(self, in_channels: int, **options: Any) -> None:
        super().__init__(in_channels, **options)


def register() -> None:
    """Register the three layers in `mmengine.registry.MODELS`; nothing happens a second time.

    Raises:
        ImportError: mmengine is not installed.
        KeyError: another project has registered something under one of the names.

    Example:
        >>> register()  # doctest: +SKIP
        >>> from mmengine.registry import MODELS  # doctest: +SKIP
        >>> MODELS.build({"type": "FullyAttentional", "in_channels": 64})  # doctest: +SKIP
    """
    from mmengine.registry import MODELS

    for layer in (_FullyAttentional, _ChannelNonLocal, _SpatialNonLocal):
        name = layer.__name__.removeprefix("_")
        if MODELS.get(name) is not layer:
            MODELS.register_module(name=name, module=layer)
