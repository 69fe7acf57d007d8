"""The part in which the networks that are compared differ: a module from C channels to C.

All of them leave their input as it is, or double it, until training moves them; so networks that
differ in this part alone start from the same function.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fullattn.layers import LAYERS, ChannelNonLocal, SpatialNonLocal

__all__ = ["Attention", "Convolution", "Dual", "attentions", "build"]

Attention: TypeAlias = str | Callable[[int], nn.Module]


class Dual(nn.Module):
    """Channel and spatial attention side by side, summed.

    y = ChannelNonLocal(x) + SpatialNonLocal(x), each with its own residual.

    Args:
        channels: C.

    Shape:
        x: (B, C, H, W).
        output: as x.

    Source:
        The arrangement of Fu et al., CVPR 2019 (arXiv 1809.02983), section 3.1, on one input.

    Example:
        >>> x = torch.randn(2, 16, 9, 7)
        >>> torch.equal(Dual(16)(x), 2 * x)  # both leave x as it is at first
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = ChannelNonLocal(channels)
        self.spatial = SpatialNonLocal(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers to x and add what they give."""
        y: Tensor = self.channel(x) + self.spatial(x)
        return y


class Convolution(nn.Module):
    """Two 1x1 convolutions with as many parameters as FullyAttentional, no attention: a control.

    y = x + gamma · norm( second( ReLU( first(x) ) ) ), gamma 0 at first.

    Without the normalisation the branch is so small beside x that training hardly uses it, and the
    control would be none.

    Args:
        channels: C.

    Shape:
        x: (B, C, H, W).
        output: as x.

    Example:
        >>> from fullattn import FullyAttentional
        >>> sizes = [sum(p.numel() for p in module.parameters())
        ...          for module in (Convolution(16), FullyAttentional(16, project=False))]
        >>> sizes
        [545, 545]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Add what the two convolutions make of x."""
        y: Tensor = x + self.gamma * self.norm(self.second(torch.relu(self.first(x))))
        return y


def _channel_then_spatial(channels: int) -> nn.Module:
    steps: OrderedDict[str, nn.Module] = OrderedDict(
        channel=ChannelNonLocal(channels), spatial=SpatialNonLocal(channels)
    )
    return nn.Sequential(steps)


def _none(channels: int) -> nn.Module:
    return nn.Identity()


_OTHERS: Mapping[str, Callable[[int], nn.Module]] = {
    "dual": Dual,
    "channel_spatial": _channel_then_spatial,
    "none": _none,
    "convolution": Convolution,
}


def attentions() -> tuple[str, ...]:
    """The names that `build` knows: of the registered layers, and of what they are compared with.

    Returns:
        The names.

    Example:
        >>> attentions()
        ('fully', 'channel', 'spatial', 'dual', 'channel_spatial', 'none', 'convolution')
    """
    return (*LAYERS, *_OTHERS)


def build(attention: Attention, channels: int, options: Mapping[str, Any]) -> nn.Module:
    """The module for a name of `attentions`, or what a callable of the channel count gives.

    Args:
        attention: the name or the callable.
        channels: C.
        options: keywords for a registered layer, over those with which it goes into a head.

    Returns:
        The module.

    Raises:
        ValueError: an unknown name, or options for something that takes none.
        TypeError: neither a name nor a callable, an option that the layer does not have, or a
            callable that gives something other than a module.
    """
    if isinstance(attention, str):
        if attention in LAYERS:
            # A head ends with a projection of its own, the same for all.
            layer = LAYERS[attention]
            return layer(channels, **{**layer.head_options, **options})
        if attention not in _OTHERS:
            near = difflib.get_close_matches(attention, attentions(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            allowed = ", ".join(map(repr, attentions()))
            raise ValueError(
                f"attention must be one of {allowed} or a callable, got {attention!r}{hint}"
            )
        if options:
            raise ValueError(
                f"attention_options are for {', '.join(map(repr, LAYERS))}, "
                f"got attention={attention!r}"
            )
        return _OTHERS[attention](channels)
    if isinstance(attention, nn.Module) or not callable(attention):
        raise TypeError(
            f"attention must be a name or a callable of the channel count, got {attention!r}"
        )
    if options:
        raise ValueError("attention_options are for named attention; bind them to the callable")
    module = attention(channels)
    if not isinstance(module, nn.Module):
        raise TypeError(f"attention({channels}) must give a module, got {type(module).__name__}")
    return module
