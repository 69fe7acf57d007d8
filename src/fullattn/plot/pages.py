"""Similarity maps as one HTML file in which a click on the photograph moves the point.

The file contains the tensors that the layers compare, not the maps, whose size is quadratic in the
number of positions: a short script computes the maps at a point. The file has no dependencies.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from torch import Tensor, nn

from fullattn.attention import Branch
from fullattn.layers import ChannelNonLocal
from fullattn.plot import figures
from fullattn.plot.draw import as_photograph
from fullattn.plot.layers import LayerMaps, has_channel_maps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["page"]


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
    """Create a self-contained, interactive HTML page of layers' similarity maps.

    Args:
        layers: by heading, a layer and its input (C, h, w) or (1, C, h, w).
        photograph: uint8: a tensor (3, H, W), an array (H, W, 3) or a Pillow image.
        point: initial column and row, in pixels of `size`; default the centre.
        size: original height and width if the photograph was scaled down, the unit of points;
            default the photograph's own.
        beside: as in `similarity`.
        title: title of the page.
        notes: sentences for the foot of the page.

    Returns:
        The HTML text; write it to a file as UTF-8.

    Raises:
        TypeError: not a layer of this package, or not a photograph.
        ValueError: no layer, several feature maps, or a point outside the photograph.

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
    tensors: dict[str, int] = {}  # encoded, with their indices; equal ones are stored once

    def add(tensor: Tensor) -> int:
        numbers = tensor.float().cpu().contiguous().numpy().astype("<f4")
        return tensors.setdefault(_base64(numbers.tobytes()), len(tensors))

    with torch.no_grad():
        described = [
            {"title": name, **_describe(layer, features, beside, add)}
            for name, (layer, features) in layers.items()
        ]
    data = {
        "width": width,
        "height": height,
        "point": [x, y],
        "photograph": _jpeg(picture),
        "colours": {"weights": _colours("viridis"), "signed": _colours("berlin")},
        "layers": described,
        "tensors": list(tensors),
    }
    # HTML tags end a script element even inside a string.
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
    layer: nn.Module, x: Tensor, beside: ChannelNonLocal | None, add: Callable[[Tensor], int]
) -> dict[str, Any]:
    """Describe a layer for the script, and add its tensors."""
    seen = LayerMaps(layer, x)
    sizes = zip(("channels", "height", "width"), seen.features.shape[1:], strict=True)
    described: dict[str, Any] = {**dict(sizes), "factor": seen.call.scale}
    if not has_channel_maps(seen.layer):
        return described | {
            "form": "positions",
            "score": seen.call.score.name.lower(),
            "branches": [_positions(*each, add) for each in seen.branches],
        }
    described["features"] = add(seen.features[0])
    (slices, first), *_ = seen.branches
    if not slices:
        return described | {"form": "channels", "map": add(seen.whole(first)[0])}
    single = seen.beside(beside)
    return described | {
        "form": "slices",
        "single": add(single),
        "branches": [
            {
                "slices": slices,
                "query": add(branch.query[0]),
                "key": add(branch.tokens()[1][0]),
                "distances": add(figures.distances(seen.whole(branch), single)),
            }
            for slices, branch in seen.branches
        ],
    }


def _positions(slices: str, branch: Branch, add: Callable[[Tensor], int]) -> dict[str, Any]:
    """Describe a branch that compares positions: query and key as feature maps, and the slices."""
    key = branch.key
    if key.dim() == 3:  # shared by all slices
        (count, _, _), size = branch.cut.sizes(branch.query.shape), branch.query.shape[2:]
        key = branch.cut.inverse(key[:, None].expand(-1, count, -1, -1), *size)
    return {
        "query": add(branch.query[0].flatten(1)),
        "key": add(key[0].flatten(1)),
        "tokenFeatures": branch.query.shape[1],
        "keyHeight": key.shape[2],
        "keyWidth": key.shape[3],
        "within": slices or None,
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _jpeg(photograph: Tensor) -> str:
    """Encode a photograph as a data URL."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(photograph.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{_base64(file.getvalue())}"


def _colours(name: str) -> str:
    """Encode the 256 colours of a colour map."""
    table = matplotlib.colormaps[name](range(256), bytes=True)[:, :3]
    return _base64(table.tobytes())


def _asset(name: str) -> str:
    return resources.files("fullattn.plot").joinpath(name).read_text("utf-8")
