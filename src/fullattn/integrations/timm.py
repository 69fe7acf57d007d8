"""The layers in timm.

timm has no registry of attention layers: where its networks take one by name (`attn_layer="se"`)
they take a class as well, and any layer of this package fits. What timm does register are modules
that its tracer is not to look into when it extracts features by name, and there the layers belong.
"""

from __future__ import annotations

from fullattn.layers import LAYERS

__all__ = ["register"]


def register() -> None:
    """Make the layers leaves of timm's feature extraction by tracing (`feature_cls="fx"`).

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
