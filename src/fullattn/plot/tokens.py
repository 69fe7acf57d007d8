"""What a layer compares with what, and its maps at one place: small where a whole map is large."""

from __future__ import annotations

from torch import Tensor

from fullattn.attention import AttentionCall, Branch
from fullattn.attention.reference import similarity
from fullattn.layers import AttentionLayer
from fullattn.plot.figures import Slices

__all__ = ["branches_of", "has_channel_maps", "slices_of", "weights_at", "whole_maps"]

_SLICES: dict[str, Slices] = {"w": "column", "h": "row"}


def branches_of(layer: AttentionLayer, features: Tensor) -> tuple[AttentionCall, list[Branch]]:
    """What a layer compares, in float32.

    Args:
        layer: the layer.
        features: what it is given, (1, C, h, w).

    Returns:
        The call, for its scale and score function, and its branches.

    Raises:
        ValueError: its tokens are neither channels nor positions, or its slices neither columns
            nor rows.
    """
    features, _ = layer.check(features)
    call = layer.attention(features)
    found = []
    for cut, query, key, value in call.branches:
        of_channels = cut.tokens == "c"
        if not (of_channels or "c" in cut.features) or cut.slices not in ("", *_SLICES):
            raise ValueError(f"maps of {cut.name} are not of channels or positions: no drawing")
        found.append(Branch(cut, query.float(), key.float(), value.float()))
    return call, found


def has_channel_maps(layer: AttentionLayer) -> bool:
    """Whether a layer compares channels; otherwise it compares positions."""
    return all(cut.tokens == "c" for cut in layer.operation.cuts)


def slices_of(branch: Branch) -> Slices | None:
    """What a branch has a map of its own for; None where it has one for the whole image."""
    return _SLICES.get(branch.cut.slices)


def whole_maps(call: AttentionCall, branch: Branch) -> Tensor:
    """All maps of a branch.

    Args:
        call: the branch's.
        branch: of one image.

    Returns:
        (S, N, M).
    """
    query, key, _ = branch.tokens()
    return similarity(query, key, call.scale, call.score)[0]


def weights_at(call: AttentionCall, branch: Branch, column: int, row: int) -> Tensor:
    """What a position attends to, for a branch whose tokens are positions.

    Args:
        call: the branch's.
        branch: of one image.
        column: of the position.
        row: of the position.

    Returns:
        The weight of every position of the key, (h', w'); 0 outside of the position's slice.
    """
    query, key, _ = branch.tokens()
    height, width = branch.query.shape[2:]
    sizes, at = {"h": height, "w": width}, {"h": row, "w": column}

    def index(axes: str) -> int:
        place = 0
        for axis in axes:
            place = place * sizes[axis] + at[axis]
        return place

    own, token = index(branch.cut.slices), index(branch.cut.tokens)
    keys = key[:, min(own, key.shape[1] - 1)][:, None]
    weights = similarity(
        query[:, own, token][:, None, None], keys, call.scale, call.score
    ).flatten()
    if branch.key.dim() == 4:
        height, width = branch.key.shape[2:]
    if not branch.cut.slices:
        return weights.reshape(height, width)
    full = weights.new_zeros(height, width)
    if branch.cut.slices == "h":
        full[row] = weights
    else:
        full[:, column] = weights
    return full
