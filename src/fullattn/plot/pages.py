"""Similarity maps as one HTML file in which a click on the photograph moves the point.

The file holds what the layers compare, not the maps, which grow with the square of the positions:
a script of a few lines builds the maps of a point when it moves. It needs nothing from outside.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from torch import Tensor, nn

from fullattn.attention import Kind
from fullattn.layers import ChannelNonLocal, FullyAttentional, SpatialNonLocal
from fullattn.plot import figures
from fullattn.plot.draw import as_photograph, channel_map_beside, check_layer, one_feature_map
from fullattn.plot.tokens import position_tokens, slice_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["page"]

_KINDS = {
    Kind.SOFTMAX: "softmax",
    Kind.DOT_PRODUCT: "dot_product",
    Kind.CONCATENATION: "concatenation",
}


class _Tensors:
    """Tensors for the page, each once, by number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def add(self, tensor: Tensor) -> int:
        little = tensor.detach().float().cpu().contiguous().numpy().astype("<f4")
        text = base64.b64encode(little.tobytes()).decode()
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def page(
    layers: Mapping[str, tuple[nn.Module, Tensor]],
    photograph: Tensor | NDArray[np.uint8] | Image,
    *,
    point: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    beside: ChannelNonLocal | None = None,
    title: str = "",
    notes: Sequence[str] = (),
) -> str:
    """One HTML page, whole in itself, of what layers attend to in a photograph.

    Args:
        layers: for each heading a layer and what it is given, (C, h, w) or (1, C, h, w).
        photograph: uint8: a tensor (3, H, W), an array (H, W, 3) or a Pillow image.
        point: column and row where the point starts, in pixels of `size`; None for the middle.
        size: height and width that points are told in, where the photograph was scaled down; None
            for its own.
        beside: as in `similarity`.
        title: of the page.
        notes: sentences for the foot of the page.

    Returns:
        HTML; write it to a file as UTF-8.

    Raises:
        TypeError: a layer without similarity maps, or not a photograph.
        ValueError: no layer, more than one feature map, or a point outside the photograph.

    Example:
        >>> x, photograph = torch.randn(8, 5, 7), torch.zeros(3, 40, 56, dtype=torch.uint8)
        >>> text = page({"channel": (ChannelNonLocal(8), x)}, photograph, title="eight channels")
        >>> "<h1>eight channels</h1>" in text, "http" in text
        (True, False)
    """
    if not layers:
        raise ValueError("expected at least one layer")
    picture = as_photograph(photograph)
    height, width = size or (picture.shape[1], picture.shape[2])
    x, y = (width // 2, height // 2) if point is None else point
    figures.cell_of((x, y), torch.empty(3, height, width), torch.empty(1, 1))
    tensors = _Tensors()
    with torch.no_grad():
        described = [
            {"title": name, **_describe(layer, features, beside, tensors)}
            for name, (layer, features) in layers.items()
        ]
    data = {
        "width": width,
        "height": height,
        "point": [x, y],
        "photograph": _jpeg(picture),
        "colours": {"weights": _colours("viridis"), "signed": _colours("berlin")},
        "layers": described,
        "tensors": tensors.texts,
    }
    # What ends a script element, or opens another in it, does so inside of a string as well.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title or "Similarity maps"),
        "style": _asset("page.css"),
        "notes": "\n".join(f"<p>{html.escape(note)}</p>" for note in notes),
        "maps": _asset("maps.js"),
        "script": _asset("page.js"),
        "data": text,
    }
    return re.sub(r"{{(\w+)}}", lambda mark: parts[mark[1]], _asset("page.html"))


def _describe(
    layer: nn.Module, x: Tensor, beside: ChannelNonLocal | None, tensors: _Tensors
) -> dict[str, Any]:
    """A layer with its tensors, in the script's words."""
    check_layer(layer)
    features = one_feature_map(x)
    channels, height, width = features.shape[1:]
    described: dict[str, Any] = {"channels": channels, "height": height, "width": width}
    if isinstance(layer, SpatialNonLocal):
        positions = position_tokens(layer, features)
        return described | {
            "form": "positions",
            "kind": _KINDS[positions.kind],
            "factor": positions.factor,
            "query": tensors.add(positions.query.T),
            "key": tensors.add(positions.key.T),
            "tokenFeatures": positions.query.shape[1],
            "keyHeight": positions.size[0],
            "keyWidth": positions.size[1],
        }
    described["features"] = tensors.add(features[0])
    if isinstance(layer, ChannelNonLocal):
        return described | {"form": "channels", "map": tensors.add(layer.similarity(features)[0])}
    assert isinstance(layer, FullyAttentional)
    maps = layer.similarity(features)
    single = channel_map_beside(layer, features, beside)
    slices = slice_tokens(layer, features)
    return described | {
        "form": "slices",
        "factor": slices.factor,
        "columnKey": tensors.add(slices.column_key),
        "rowKey": tensors.add(slices.row_key),
        "single": tensors.add(single),
        "columnDistances": tensors.add(figures.distances(maps.columns[0], single)),
        "rowDistances": tensors.add(figures.distances(maps.rows[0], single)),
    }


def _jpeg(photograph: Tensor) -> str:
    """A photograph as an address that holds it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(photograph.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _colours(name: str) -> str:
    """The 256 colours of a colour map, as bytes."""
    table = matplotlib.colormaps[name](range(256), bytes=True)[:, :3]
    return base64.b64encode(table.tobytes()).decode()


def _asset(name: str) -> str:
    return resources.files("fullattn.plot").joinpath(name).read_text("utf-8")
