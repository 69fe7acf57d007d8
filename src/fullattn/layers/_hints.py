"""Hints at the end of the layers' error messages; they are made only where an error is raised."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fullattn._text import did_you_mean

__all__ = ["of_dtype", "of_keyword", "of_shape", "of_type", "shown"]

# What other libraries call the channels, and what they ask for where these layers do not.
_CHANNELS = (
    *("c1", "dim", "embed_dim", "in_channel", "in_channels", "in_dim"),
    *("in_features", "in_planes", "inplanes", "num_channels", "planes"),
)
_KEYWORDS = {
    **dict.fromkeys(_CHANNELS, "; did you mean 'channels'?"),
    **dict.fromkeys(
        ("feature_size", "h", "height", "img_size", "input_size", "size", "w", "width"),
        "; height and width are free",
    ),
    **dict.fromkeys(
        ("c2", "out_channels", "out_dim", "out_planes"),
        "; the output has the channels of the input",
    ),
}

# By the number of axes, and the axis that has the layer's channels.
_LAYOUTS = {
    (4, 3): "; for (B, H, W, C) use x.permute(0, 3, 1, 2)",
    (3, 2): "; for (H, W, C) use x.permute(2, 0, 1), for tokens (B, N, C) use "
    "x.mT.unflatten(2, (H, W))",
    (3, 1): "; for (B, C, N) use x.unflatten(2, (H, W))",
    (2, 1): "; for tokens (N, C) use x.mT.unflatten(1, (H, W))",
    (5, 1): "; for (B, C, T, H, W) use x.transpose(1, 2).flatten(0, 1)",
    (5, 2): "; for (B, T, C, H, W) use x.flatten(0, 1)",
}


def of_keyword(name: str, free: Collection[str]) -> str:
    """Return the hint for an unknown keyword, with `free` the arguments that are not given."""
    expected = f"; expected {', '.join(free)}"
    if name in _CHANNELS and "channels" not in free:
        return expected
    return _KEYWORDS.get(name) or did_you_mean(name, free) or expected


def of_shape(shape: Sequence[int], channels: int) -> str:
    """Return the hint for a shape that is not (B, C, H, W) or (C, H, W)."""
    for (axes, axis), hint in _LAYOUTS.items():
        if len(shape) == axes and shape[axis] == channels:
            return hint
    if len(shape) in (3, 4) and shape[-3] == 3:
        return f"; an image needs a module before the layer, from 3 to {channels} channels"
    return ""


def of_dtype(dtype: torch.dtype) -> str:
    """Return the hint for a dtype that is not a real floating-point one."""
    image = ", for an image x.float() / 255" if dtype == torch.uint8 else ""
    return "" if dtype.is_complex else f"; use x.float(){image}"


def of_type(x: object) -> str:
    """Return the hint for what is no tensor."""
    library = type(x).__module__.partition(".")[0]
    if library == "numpy":
        return "; use torch.from_numpy(x)"
    if library == "PIL":
        return "; use torch.from_numpy(numpy.array(x)).permute(2, 0, 1) / 255"
    if isinstance(x, (list, tuple, Mapping)):
        items = list(x.items() if isinstance(x, Mapping) else enumerate(x))
        if items and isinstance(items[-1][1], Tensor):
            return f"; give one of its feature maps, such as x[{items[-1][0]!r}]"
    return ""


def shown(value: Any) -> str:
    """Show a value in one line."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"an instance of {type(value).__name__}" if isinstance(value, nn.Module) else repr(value)
