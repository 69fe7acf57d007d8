"""Channel attention with one map of channels for the whole image.

Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019 (arXiv 1809.02983). The scores
are sums over all positions: the map keeps which channel, and no position.

DANet's published code differs from its paper: it computes softmax(max(S) - S), which attends to the
*least* similar channels. The default here is the paper's formula; `least_similar=True` is that of
the code. Without a scale the map is close to the identity, because the product of a channel with
itself grows with H·W; `scale=None` (1/√(H·W)) makes it softer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fullattn import functional
from fullattn.attention import AttentionCall, BranchSizes, Operation
from fullattn.attention.dispatch import check_name
from fullattn.attention.sizes import Size
from fullattn.layers import _checks
from fullattn.layers.protocol import AttentionLayer, Work
from fullattn.reshape import CHANNELS

__all__ = ["ChannelNonLocal"]


class ChannelNonLocal(AttentionLayer):
    """Attention between channels with one C×C map for the whole image.

    y = gamma · attended + x, where, with p over the H·W positions,

        similarity[b, i, j] = softmax_j( scale · Σ_p x[b, i, p] · x[b, j, p] )
        attended[b, i, p] = Σ_j similarity[b, i, j] · x[b, j, p]

    Args:
        channels: C.
        scale: factor on the scores; None for 1/√(H·W). The paper uses none (1.0).
        least_similar: take max(S) - S in place of the scores S, as DANet's published code does; it
            attends to the least similar channels. Off by default, because the paper's formula
            says otherwise.
        gamma_init: initial value of gamma. At the paper's 0 the layer starts as the identity.
        backend: name of the attention backend; None for the automatic choice.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        x: (B, C, H, W) or (C, H, W).
        output: as x.

    Raises:
        ValueError: an invalid option, or an input of a wrong shape or device.
        TypeError: an option of a wrong type, or an input of a wrong dtype.

    Source:
        Fu et al., CVPR 2019 (arXiv 1809.02983), section 3.3.

    Example:
        >>> import torch
        >>> layer = ChannelNonLocal(16)
        >>> x = torch.randn(2, 16, 9, 7)
        >>> torch.equal(layer(x), x)  # gamma starts at 0
        True
    """

    layer_name = "channel"
    paper = "Fu et al., CVPR 2019 (arXiv 1809.02983)"
    gamma: nn.Parameter
    operation: ClassVar[Operation] = functional.CHANNEL_ATTENTION

    def __init__(
        self,
        channels: int,
        *,
        scale: float | None = 1.0,
        least_similar: bool = False,
        gamma_init: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels: int = _checks.positive(channels, "channels")
        self.scale: float | None = _checks.scale(scale)
        self.least_similar: bool = _checks.option(least_similar, "least_similar", (False, True))
        self.gamma_init: float = _checks.number(gamma_init, "gamma_init")
        self.backend: str | None = check_name(backend)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gamma = nn.Parameter(torch.empty(1, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        nn.init.constant_(self.gamma, self.gamma_init)

    def attention(self, x: Tensor) -> AttentionCall:
        """Compare the channels of x with each other."""
        return functional.channel_call(x, scale=self.scale, least_similar=self.least_similar)

    def work(self, shape: tuple[Size, Size, Size, Size], size: Size) -> Work:
        """Return the sizes of the attention; there are no other modules."""
        batch, channels, height, width = shape
        scale = 0.5 if self.scale is None else self.scale
        branch = BranchSizes.of(CHANNELS, shape, scale=-scale if self.least_similar else scale)
        return Work(
            branches=(branch,),
            flops=0,
            parameters=1,
            inputs=0,
            kept=0,
            # The gradients of query, key and value.
            gradients=3 * batch * channels * height * width * size,
        )
