"""Keep inserted layers in what segmentation-models-pytorch saves and loads.

`from_pretrained` builds a network from the arguments in its `config.json`. `fullattn.insert` and
`swap` note their changes in the network's config, which `save_pretrained` writes. Once this
integration is registered, `from_pretrained` makes them again before it loads the weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fullattn.swap.operations import replay_unkept
from fullattn.swap.rebuilt import Description

__all__ = ["register"]

_KEY = "_fullattn"  # keys with an underscore are not passed to the network


def register() -> None:
    """Have `from_pretrained` make the saved changes; repeated calls do nothing.

    Raises:
        ImportError: segmentation-models-pytorch is not installed.

    Example:
        >>> register()  # doctest: +SKIP
        >>> model = smp.Unet("resnet34", classes=5)  # doctest: +SKIP
        >>> fullattn.insert(  # doctest: +SKIP
        ...     model, fullattn.FullyAttentional, after="encoder.layer4", project=False
        ... )
        >>> model.save_pretrained("unet")  # doctest: +SKIP
        >>> again = smp.from_pretrained("unet")  # doctest: +SKIP
    """
    from segmentation_models_pytorch.base.hub_mixin import SMPHubMixin

    if "_load_as_safetensor" in vars(SMPHubMixin):
        return

    def load(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        for change in model.config.get(_KEY, ()):
            replay_unkept(model, change)
        return super(SMPHubMixin, cls)._load_as_safetensor(model, *args, **kwargs)

    SMPHubMixin._load_as_safetensor = classmethod(load)


def description(model: nn.Module) -> Description | None:
    """Return the changes in the config of a network of segmentation-models-pytorch."""
    from segmentation_models_pytorch.base.hub_mixin import SMPHubMixin

    if not isinstance(model, SMPHubMixin):
        return None
    return Description(model.config.setdefault(_KEY, []))
