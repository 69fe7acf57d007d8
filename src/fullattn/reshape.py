"""The one place where the axes of a feature map are regrouped for attention.

Every function turns a feature map of shape (B, C, H, W) into the layout (B, S, N, D) that
`fullattn.attention` works on (S independent slices of N tokens with D features), and each has its
inverse. All of them return views where the strides allow it; nothing is computed.
"""

from einops import rearrange
from torch import Tensor

__all__ = [
    "from_channels",
    "from_columns",
    "from_positions",
    "from_rows",
    "to_channels",
    "to_columns",
    "to_positions",
    "to_rows",
]


def to_columns(x: Tensor) -> Tensor:
    """Cut a feature map into its columns: W slices of C channel tokens with H features.

    Args:
        x: feature map, (B, C, H, W).

    Returns:
        (B, W, C, H), a view.

    Example:
        >>> import torch
        >>> to_columns(torch.zeros(2, 3, 4, 5)).shape
        torch.Size([2, 5, 3, 4])
    """
    return rearrange(x, "b c h w -> b w c h")


def from_columns(slices: Tensor) -> Tensor:
    """Put columns back into a feature map; the inverse of `to_columns`.

    Args:
        slices: (B, W, C, H).

    Returns:
        (B, C, H, W), a view.

    Example:
        >>> import torch
        >>> from_columns(torch.zeros(2, 5, 3, 4)).shape
        torch.Size([2, 3, 4, 5])
    """
    return rearrange(slices, "b w c h -> b c h w")


def to_rows(x: Tensor) -> Tensor:
    """Cut a feature map into its rows: H slices of C channel tokens with W features.

    Args:
        x: feature map, (B, C, H, W).

    Returns:
        (B, H, C, W), a view.

    Example:
        >>> import torch
        >>> to_rows(torch.zeros(2, 3, 4, 5)).shape
        torch.Size([2, 4, 3, 5])
    """
    return rearrange(x, "b c h w -> b h c w")


def from_rows(slices: Tensor) -> Tensor:
    """Put rows back into a feature map; the inverse of `to_rows`.

    Args:
        slices: (B, H, C, W).

    Returns:
        (B, C, H, W), a view.

    Example:
        >>> import torch
        >>> from_rows(torch.zeros(2, 4, 3, 5)).shape
        torch.Size([2, 3, 4, 5])
    """
    return rearrange(slices, "b h c w -> b c h w")


def to_channels(x: Tensor) -> Tensor:
    """One slice whose C tokens are the channels, with all H·W positions as features.

    Args:
        x: feature map, (B, C, H, W).

    Returns:
        (B, 1, C, H·W), a view of a contiguous input.

    Example:
        >>> import torch
        >>> to_channels(torch.zeros(2, 3, 4, 5)).shape
        torch.Size([2, 1, 3, 20])
    """
    return rearrange(x, "b c h w -> b 1 c (h w)")


def from_channels(slices: Tensor, height: int, width: int) -> Tensor:
    """Put channel tokens back into a feature map; the inverse of `to_channels`.

    Args:
        slices: (B, 1, C, H·W).
        height: H.
        width: W.

    Returns:
        (B, C, H, W), a view of a contiguous input.

    Example:
        >>> import torch
        >>> from_channels(torch.zeros(2, 1, 3, 20), 4, 5).shape
        torch.Size([2, 3, 4, 5])
    """
    return rearrange(slices, "b 1 c (h w) -> b c h w", h=height, w=width)


def to_positions(x: Tensor) -> Tensor:
    """One slice whose H·W tokens are the positions, with the C channels as features.

    Args:
        x: feature map, (B, C, H, W).

    Returns:
        (B, 1, H·W, C), a view of a contiguous or channels_last input.

    Example:
        >>> import torch
        >>> to_positions(torch.zeros(2, 3, 4, 5)).shape
        torch.Size([2, 1, 20, 3])
    """
    return rearrange(x, "b c h w -> b 1 (h w) c")


def from_positions(slices: Tensor, height: int, width: int) -> Tensor:
    """Put position tokens back into a feature map; the inverse of `to_positions`.

    Args:
        slices: (B, 1, H·W, C).
        height: H.
        width: W.

    Returns:
        (B, C, H, W), a view.

    Example:
        >>> import torch
        >>> from_positions(torch.zeros(2, 1, 20, 3), 4, 5).shape
        torch.Size([2, 3, 4, 5])
    """
    # Not in one step: 1 and H side by side leave a guard 1 % H behind, which a strict export with
    # free sizes cannot prove where H is a quotient of the height of an image.
    positions = rearrange(slices, "b 1 n c -> b n c")
    return rearrange(positions, "b (h w) c -> b c h w", h=height, w=width)
