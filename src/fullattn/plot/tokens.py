"""The tokens that a layer compares, and its similarity maps or one position's part of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fullattn.attention import AttentionCall, Branch
from fullattn.attention.reference import similarity
from fullattn.layers import AttentionLayer

__all__ = ["branches_of", "has_channel_maps", "slices_of", "weights_at", "whole_maps"]

_SLICES = {"": "", "w": "column", "h": "row"}


def branches_of(layer: AttentionLayer, features: Tensor) -> tuple[AttentionCall, list[Branch]]:
    """Return a layer's attention call for features (1, C, h, w), and its branches in float32.

    Raises:
        ValueError: the tokens are neither channels nor positions, or the slices are neither
            columns nor rows.
    """
    features, _ = layer.check(features)
    call = layer.attention(features)
    for cut, *_ in call.branches:
        if (cut.tokens != "c" and "c" not in cut.features) or cut.slices not in _SLICES:
            raise ValueError(f"cannot draw {cut.name}: expected maps of channels or positions")
    return call, [
        Branch(b.cut, b.query.float(), b.key.float(), b.value.float()) for b in call.branches
    ]


def has_channel_maps(layer: AttentionLayer) -> bool:
    """Return whether a layer compares channels; otherwise it compares positions."""
    return all(cut.tokens == "c" for cut in layer.operation.cuts)


def slices_of(branch: Branch) -> str:
    """Return "column" or "row" if each has a map, "" if there is one map for the whole image."""
    return _SLICES[branch.cut.slices]


def whole_maps(call: AttentionCall, branch: Branch) -> Tensor:
    """Return all maps of a branch for one image, (S, N, M)."""
    query, key, _ = branch.tokens()
    return similarity(query, key, call.scale, call.score)[0]


def weights_at(call: AttentionCall, branch: Branch, column: int, row: int) -> Tensor:
    """Return the weights (h', w') that a position gives to the key's positions.

    The branch compares positions. Weights are 0 outside the position's slice. The whole map, which
    may be large, is not built.
    """
    cut, (height, width) = branch.cut, branch.query.shape[2:]
    query, key, _ = branch.tokens()
    found = cut(_numbered(height, width)) == row * width + column
    _, own, token, _ = found.nonzero()[0].tolist()
    keys = key[:, min(own, key.shape[1] - 1)][:, None]
    weights = similarity(query[:, own, token][:, None, None], keys, call.scale, call.score)
    if branch.key.dim() == 4:
        height, width = branch.key.shape[2:]
    all_weights = weights.new_zeros(height * width)
    all_weights[cut(_numbered(height, width))[0, own]] = weights.view(-1, 1)
    return all_weights.view(height, width)


def _numbered(height: int, width: int) -> Tensor:
    """Return a feature map that holds the number of each position."""
    return torch.arange(height * width).view(1, 1, height, width)
