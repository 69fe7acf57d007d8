"""The attention modules of a segmentation head, by name: modules from C channels to C.

At initialisation each returns its input, or twice its input, so that networks that differ only in
the attention start from the same function.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fullattn._text import did_you_mean
from fullattn.layers import LAYERS, ChannelNonLocal, SpatialNonLocal

__all__ = ["Attention", "Convolution", "Dual", "attentions", "build"]

Attention: TypeAlias = str | Callable[[int], nn.Module]


class Dual(nn.Module):
    """Sum of channel and spatial attention.

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
        >>> torch.equal(Dual(16)(x), 2 * x)  # each is the identity at initialisation
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel: ChannelNonLocal = ChannelNonLocal(channels)
        self.spatial: SpatialNonLocal = SpatialNonLocal(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers to x and add the results."""
        y: Tensor = self.channel(x) + self.spatial(x)
        return y


class Convolution(nn.Module):
    """Two 1x1 convolutions with as many parameters as FullyAttentional: a baseline.

    y = x + gamma · norm( second( ReLU( first(x) ) ) ), gamma 0 at initialisation.

    Without the normalisation the branch is so small relative to x that training hardly uses it.

    Example:
        >>> from fullattn import FullyAttentional
        >>> sizes = [sum(p.numel() for p in module.parameters())
        ...          for module in (Convolution(16), FullyAttentional(16, project=False))]
        >>> sizes
        [545, 545]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first: nn.Conv2d = nn.Conv2d(channels, channels, 1, bias=False)
        self.second: nn.Conv2d = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm: nn.BatchNorm2d = nn.BatchNorm2d(channels)
        self.gamma: nn.Parameter = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch of two convolutions to x."""
        y: Tensor = x + self.gamma * self.norm(self.second(torch.relu(self.first(x))))
        return y


_OTHERS: Mapping[str, Callable[[int], nn.Module]] = {
    "dual": Dual,
    "channel_spatial": lambda channels: nn.Sequential(
        OrderedDict(channel=ChannelNonLocal(channels), spatial=SpatialNonLocal(channels))
    ),
    "none": nn.Identity,
    "convolution": Convolution,
}


def attentions() -> tuple[str, ...]:
    """Return the names of attentions: registered layers, combinations and baselines.

    Example:
        >>> attentions()
        ('fully', 'channel', 'spatial', 'dual', 'channel_spatial', 'none', 'convolution')
    """
    return (*LAYERS, *_OTHERS)


def build(attention: Attention, channels: int, options: Mapping[str, Any]) -> nn.Module:
    """Build an attention by name, with options for a registered layer, or with a callable."""
    if isinstance(attention, str):
        if attention in LAYERS:
            layer = LAYERS[attention]
            return layer(channels, **{**layer.head_options, **options})
        if attention not in _OTHERS:
            allowed = ", ".join(map(repr, attentions()))
            raise ValueError(
                f"expected attention of {allowed} or a callable, got {attention!r}"
                + did_you_mean(attention, attentions())
            )
        factory = _OTHERS[attention]
    elif isinstance(attention, nn.Module) or not callable(attention):
        raise TypeError(
            f"expected attention to be a name or a callable of the channel count, got {attention!r}"
        )
    else:
        factory = attention
    if options:
        raise ValueError(
            f"attention_options need attention of {', '.join(map(repr, LAYERS))}, "
            f"got {attention!r}; bind the options of a callable to it"
        )
    module = factory(channels)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected attention({channels}) to return a module, got {type(module).__name__}"
        )
    return module
