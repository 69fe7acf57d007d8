"""Register the layers with mmengine, for configs of mmcv and mmsegmentation.

A config selects a layer by a dict, {"type": "FullyAttentional", ...}. mmcv's plugins pass the
channel count as `in_channels`, which is its name in the registered classes. Other arguments and
weights are the layers' own.

The Runner builds a network from its config, without what `fullattn.insert` and `swap` did to an
earlier one. `{"type": "Changed", "model": {...}, "changes": ["change.json"]}` builds the network of
`model` and makes saved changes in it, before the optimiser is built and weights are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from fullattn.layers import LAYERS, AttentionLayer
from fullattn.swap import replay

__all__ = ["changed", "register"]


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


def changed(model: Any, changes: Any, **overrides: Any) -> Any:
    """Build a network and make saved changes in it; registered as "Changed".

    Args:
        model: config of the network.
        changes: a file written by `Report.save`, or a list of such files or of the results of
            `Report.to_dict`, in the order in which the changes were made.
        overrides: entries of the network's config, such as the `train_cfg` that mmsegmentation's
            `init_model` sets.

    Returns:
        The network.

    Raises:
        ValueError: a change does not fit the network.
    """
    from mmengine.registry import MODELS

    network = MODELS.build({**model, **overrides})
    for change in [changes] if isinstance(changes, (str, Mapping)) else changes:
        replay(network, change)
    return network


def register() -> None:
    """Register the layers and "Changed" in `mmengine.registry.MODELS`; repeated calls do nothing.

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
    if MODELS.get("Changed") is not changed:
        MODELS.register_module(name="Changed", module=changed)
