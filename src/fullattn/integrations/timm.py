"""Register the layers with timm.

timm's networks take an attention layer by name (`attn_layer="se"`) or class; layers of this package
are passed as a class, without registration. Only timm's feature extraction by tracing requires
registration, of modules that it must not trace into.
"""

from __future__ import annotations

from fullattn.layers import LAYERS

__all__ = ["register"]


def register() -> None:
    """Register the layers as leaf modules of timm's traced feature extraction (`feature_cls="fx"`).

    Raises:
        ImportError: timm is not installed.

    Example:
        >>> register()  # doctest: +SKIP
        >>> timm.create_model(  # doctest: +SKIP
        ...     "resnet26", features_only=True, feature_cls="fx",
        ...     block_args={"attn_layer": fullattn.ChannelNonLocal},
        ... )
    """
    from timm.layers import register_notrace_module

    for layer in LAYERS.values():
        register_notrace_module(layer)
