"""What a layer compares with what, before any map is built: small where the map is large."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fullattn import functional
from fullattn.attention import Kind
from fullattn.layers import FullyAttentional, SpatialNonLocal

__all__ = ["PositionTokens", "SliceTokens", "position_tokens", "slice_tokens"]


class PositionTokens(NamedTuple):
    """The positions of one feature map, for a spatial layer.

    Attributes:
        query: (h·w, D).
        key: (h'·w', D), of the positions after subsampling.
        factor: on the scores.
        kind: how scores become weights.
        size: (h', w').
    """

    query: Tensor
    key: Tensor
    factor: float
    kind: Kind
    size: tuple[int, int]

    def weights_of(self, position: int) -> Tensor:
        """What the position with this number attends to, (h', w').

        Args:
            position: counted row by row.

        Returns:
            A row of the layer's similarity map.
        """
        query, key = self.query[None, None, position : position + 1], self.key[None, None]
        weights = functional.token_similarity(query, key, self.kind, self.factor)
        return weights.reshape(self.size)


class SliceTokens(NamedTuple):
    """The columns and rows of one feature map, for a fully attentional layer.

    Attributes:
        features: the feature map, whose columns and rows are the queries, (C, h, w).
        column_key: of all columns, (C, h).
        row_key: of all rows, (C, w).
        factor: on the scores.
    """

    features: Tensor
    column_key: Tensor
    row_key: Tensor
    factor: float


def position_tokens(layer: SpatialNonLocal, features: Tensor) -> PositionTokens:
    """What a spatial layer compares.

    Args:
        layer: the layer.
        features: what it is given, (1, C, h, w).

    Returns:
        Queries and keys in float32.
    """
    features, _ = layer._check(features)
    weights = layer._similarity_weights()
    query = functional.embedded(features, weights["query_weight"], weights["query_bias"])
    key = functional.embedded(features, weights["key_weight"], weights["key_bias"], layer.subsample)
    queries, keys, factor = functional.position_tokens(
        query, key, layer._kind, layer.scale, weights["score_weight"]
    )
    size = key.shape[2], key.shape[3]
    return PositionTokens(queries[0, 0].float(), keys[0, 0].float(), factor, layer._kind, size)


def slice_tokens(layer: FullyAttentional, features: Tensor) -> SliceTokens:
    """What a fully attentional layer compares.

    Args:
        layer: the layer.
        features: what it is given, (1, C, h, w).

    Returns:
        Features and keys in float32.
    """
    column_key, row_key = functional.column_and_row_keys(
        features,
        layer.column_key.weight,
        layer.row_key.weight,
        layer.column_key.bias,
        layer.row_key.bias,
    )
    column_key, factor = functional.scaled(column_key, layer.scale)
    row_key, _ = functional.scaled(row_key, layer.scale)
    return SliceTokens(features[0].float(), column_key[0].float(), row_key[0].float(), factor)
