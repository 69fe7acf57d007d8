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

from fullattn.attention import Branch
from fullattn.layers import ChannelNonLocal
from fullattn.plot import figures
from fullattn.plot.draw import as_photograph, channel_map_beside, check_layer, one_feature_map
from fullattn.plot.tokens import branches_of, has_channel_maps, slices_of, whole_maps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["page"]


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
    layer = check_layer(layer)
    features = one_feature_map(x)
    channels, height, width = features.shape[1:]
    call, branches = branches_of(layer, features)
    described: dict[str, Any] = {
        "channels": channels,
        "height": height,
        "width": width,
        "factor": call.scale,
    }
    if not has_channel_maps(layer):
        return described | {
            "form": "positions",
            "score": call.score.name.lower(),
            "branches": [_positions(branch, tensors) for branch in branches],
        }
    described["features"] = tensors.add(features[0])
    if slices_of(branches[0]) is None:
        maps = whole_maps(call, branches[0])
        return described | {"form": "channels", "map": tensors.add(maps[0])}
    single = channel_map_beside(layer, features, beside).float()
    return described | {
        "form": "slices",
        "single": tensors.add(single),
        "branches": [
            {
                "slices": slices_of(branch),
                "query": tensors.add(branch.query[0]),
                "key": tensors.add(branch.tokens()[1][0]),
                "distances": tensors.add(figures.distances(whole_maps(call, branch), single)),
            }
            for branch in branches
        ],
    }


def _positions(branch: Branch, tensors: _Tensors) -> dict[str, Any]:
    """A branch of positions: queries and keys as feature maps, and what they stay within."""
    key = branch.key
    if key.dim() == 3:  # of all slices one
        (count, _, _), size = branch.cut.sizes(branch.query.shape), branch.query.shape[2:]
        key = branch.cut.inverse(key[:, None].expand(-1, count, -1, -1), *size)
    return {
        "query": tensors.add(branch.query[0].flatten(1)),
        "key": tensors.add(key[0].flatten(1)),
        "tokenFeatures": branch.query.shape[1],
        "keyHeight": key.shape[2],
        "keyWidth": key.shape[3],
        "within": slices_of(branch),
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
