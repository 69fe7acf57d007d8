"""Keep inserted layers in what transformers saves and loads, and initialise them.

`from_pretrained` builds a network from its configuration, on the meta device, and initialises what
the weights lack by classes that it knows. Once this integration is registered, a layer that the
weights lack is initialised by its own `reset_parameters`, and the changes that `fullattn.insert`
and `swap` noted in the configuration are made again.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn

from fullattn.layers import AttentionLayer
from fullattn.swap import recorded
from fullattn.swap.operations import replay_unkept
from fullattn.swap.rebuilt import Description

__all__ = ["register"]

_KEY = "fullattn"  # in the configuration
_LOADED = "_is_hf_initialized"  # transformers' mark of a tensor that came from a checkpoint


def register() -> None:
    """Have transformers initialise the layers and make saved changes; repeated calls do nothing.

    A layer that is built while `transformers.modeling_utils` is imported calls this by itself.

    Raises:
        ImportError: transformers is not installed.
        ValueError: from `from_pretrained`, afterwards: a saved change does not fit the network.

    Example:
        >>> register()  # doctest: +SKIP
        >>> fullattn.insert(  # doctest: +SKIP
        ...     model, fullattn.FullyAttentional, after="decode_head.linear_fuse", project=False
        ... )
        >>> model.save_pretrained("segformer")  # doctest: +SKIP
        >>> again = type(model).from_pretrained("segformer")  # doctest: +SKIP
    """
    PreTrainedModel = _base_class()  # noqa: N806
    if hasattr(PreTrainedModel.post_init, "__wrapped__"):
        return
    post_init, initialise = PreTrainedModel.post_init, PreTrainedModel._initialize_weights
    from_pretrained = PreTrainedModel.from_pretrained.__func__

    @wraps(post_init)
    def changed(self: Any) -> None:
        _make_changes(self)
        post_init(self)

    @wraps(initialise)
    def initialised(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, AttentionLayer):
            if not getattr(module, _LOADED, False):
                _initialise(module)
                module._is_hf_initialized = True  # type: ignore[assignment]
        else:
            initialise(self, module, *args, **kwargs)

    @wraps(from_pretrained)
    def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = from_pretrained(cls, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        for change in _changes_to_make(model):  # the network was not as it was
            replay_unkept(model, change)
        return result

    PreTrainedModel.post_init = changed
    PreTrainedModel._initialize_weights = initialised
    PreTrainedModel.from_pretrained = classmethod(loaded)


def _base_class() -> Any:
    from transformers.modeling_utils import PreTrainedModel

    return PreTrainedModel


def _changes_to_make(model: Any) -> list[dict[str, Any]]:
    """Return the changes of the configuration that are of this class and not in the model yet."""
    changes = [
        change
        for change in getattr(model.config, _KEY, ())
        if change["model"]["class"] == type(model).__qualname__
    ]
    return changes[vars(model).get("_fullattn_changes_made", 0) :]


def _make_changes(model: Any) -> None:
    # Parent classes call `post_init` too, when the network is not complete.
    for change in _changes_to_make(model):
        if recorded.architecture(model) != change["model"]:
            return
        replay_unkept(model, change)
        vars(model)["_fullattn_changes_made"] = vars(model).get("_fullattn_changes_made", 0) + 1


def _initialise(layer: AttentionLayer) -> None:
    """Reset the parameters that did not come from a checkpoint."""
    tensors = layer.state_dict(keep_vars=True).values()
    loaded = [(x, x.detach().clone()) for x in tensors if getattr(x, _LOADED, False)]
    layer.reset_parameters()
    with torch.no_grad():
        for x, value in loaded:
            x.copy_(value)


def description(model: nn.Module) -> Description | None:
    """Return the changes in the configuration of a network of transformers."""
    if not isinstance(model, _base_class()):
        return None
    config: Any = model.config
    if not hasattr(config, _KEY):
        config.fullattn = []
    return Description(config.fullattn)
