"""Layers with similarity maps: find them in a network, capture their inputs, compute their maps."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fullattn import attention, functional
from fullattn.attention import AttentionCall, Branch
from fullattn.attention.reference import similarity
from fullattn.layers import LAYERS, AttentionLayer, ChannelNonLocal

__all__ = ["LayerMaps", "has_channel_maps", "inputs_of", "layers_with_maps"]

_SLICES = {"": "", "w": "column", "h": "row"}


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


def has_channel_maps(layer: AttentionLayer) -> bool:
    """Return whether a layer compares channels; otherwise it compares positions."""
    return all(cut.tokens == "c" for cut in layer.operation.cuts)


class LayerMaps:
    """The similarity maps of a layer for its input, (C, h, w) or (1, C, h, w).

    `branches` holds for each branch "column" or "row" if each has a map, "" if there is one for the
    whole image, and its tensors.

    Raises:
        TypeError: not a layer of this package, or not a tensor.
        ValueError: several feature maps, or maps that are neither of channels nor of positions, in
            the image or its columns or rows.
    """

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        if not isinstance(layer, AttentionLayer):
            hint = ""
            if inside := layers_with_maps(layer) if isinstance(layer, nn.Module) else {}:
                hint = (
                    f"; layers inside it that have them are {', '.join(map(repr, [*inside][:3]))}"
                )
                hint += ": draw one of these with its input"
            *others, last = (each.__name__ for each in LAYERS.values())
            raise TypeError(
                f"{type(layer).__name__} has no similarity maps; expected a {', '.join(others)} or "
                f"{last}{hint}"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a feature map (C, h, w), got {type(x).__name__}")
        features = x.detach()[None] if x.dim() == 3 else x.detach()
        if features.dim() != 4 or len(features) != 1:
            raise ValueError(
                f"expected one feature map, (C, h, w) or (1, C, h, w), got shape {tuple(x.shape)}"
            )
        self.layer: AttentionLayer = layer
        self.features: Tensor = features
        self.call: AttentionCall = layer.attention(layer.check(features)[0])
        for cut in self.call.operation.cuts:
            if (cut.tokens != "c" and "c" not in cut.features) or cut.slices not in _SLICES:
                raise ValueError(f"cannot draw {cut.name}: expected maps of channels or positions")
        self.branches: list[tuple[str, Branch]] = [
            (_SLICES[branch.cut.slices], branch) for branch in self.call.branches
        ]

    def whole(self, branch: Branch) -> Tensor:
        """Return all maps of a branch, (S, N, M), on the CPU."""
        query, key, _ = branch.tokens()
        return similarity(query.float(), key.float(), self.call.scale, self.call.score)[0].cpu()

    def beside(self, layer: ChannelNonLocal | None) -> Tensor:
        """Return the map (C, C) of a channel layer, by default of one with this layer's scale."""
        if layer is not None:
            single: Tensor = layer.similarity(self.features)[0]
        else:
            call = functional.channel_call(self.features, scale=self.layer.scale)
            single = attention.maps(call)[0]
        return single.float().cpu()

    def at(self, branch: Branch, column: int, row: int) -> Tensor:
        """Return the weights (h', w') that a position gives to the key's positions.

        The branch compares positions. Weights are 0 outside the position's slice. The whole map,
        which may be large, is not built.
        """
        cut, size = branch.cut, branch.query.shape[2:]
        query, key, _ = (tokens.float() for tokens in branch.tokens())
        _, own, token, _ = (cut(_numbered(size)) == row * size[1] + column).nonzero()[0].tolist()
        query, key = query[:, own, token], key[:, min(own, key.shape[1] - 1)]
        weights = similarity(query[:, None, None], key[:, None], self.call.scale, self.call.score)
        if branch.key.dim() == 4:
            size = branch.key.shape[2:]
        all_weights = weights.new_zeros(size.numel())
        all_weights[cut(_numbered(size))[0, own]] = weights.view(-1, 1)
        return all_weights.view(size)


def _numbered(size: torch.Size) -> Tensor:
    """Return a feature map that holds the number of each position."""
    return torch.arange(size.numel()).view(1, 1, *size)
