"""Find the layers of a network that have similarity maps, and capture their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["inputs_of", "layers_with_maps"]


def layers_with_maps(module: nn.Module) -> dict[str, nn.Module]:
    """Find the layers in a module, or the module itself, that have a `similarity` method.

    Args:
        module: the module to search.

    Returns:
        The layers by their dotted names; the module itself has the name "".

    Example:
        >>> from fullattn import ChannelNonLocal
        >>> list(layers_with_maps(nn.Sequential(nn.ReLU(), ChannelNonLocal(8))))
        ['1']
    """
    return {
        name: layer
        for name, layer in module.named_modules()
        if callable(getattr(layer, "similarity", None))
    }


def inputs_of(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor
) -> dict[str, Tensor]:
    """Run a network once and capture the inputs of some of its layers.

    Args:
        model: the network, in evaluation mode.
        layers: layers of the network, by any names.
        images: normalised, (B, 3, H, W).

    Returns:
        Each layer's input (B, C, h, w) by name; of several calls, the last one's.

    Raises:
        ValueError: a layer was not called.

    Example:
        >>> layer = nn.ReLU()
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), layer)
        >>> inputs_of(model, {"relu": layer}, torch.zeros(1, 3, 9, 11))["relu"].shape
        torch.Size([1, 8, 4, 5])
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs[name] = arguments[0]

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(keep, name)))
        model(images)
    if missing := [name for name in layers if name not in inputs]:
        raise ValueError(f"the network did not call its layers {', '.join(map(repr, missing))}")
    return inputs
