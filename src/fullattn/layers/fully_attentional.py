"""The fully attentional layer: channel attention with one map per column and one per row.

Song et al., Fully Attentional Network for Semantic Segmentation, AAAI 2022 (arXiv 2112.04108).

A C×C map for the whole image, as in DANet, keeps which channel and drops every position. Here each
column has a C×C map of its own: it compares the column's channels, vectors of H elements, with
those of the mean column of the image (after a Linear), so it keeps which channel and which column
and sums over the rows. The maps of the rows do the same with H and W exchanged. Both results are
added. The code is the method `attention` below and the first functions of `fullattn.functional`.

Notes:
- The paper does not scale the scores by 1/√d; `scale=None` does.
- gamma starts at 0, so at first the layer is the identity with `project=False`, and the projection
  alone with `project=True`.
- The official implementation (https://github.com/maggiesong7/FullyAttentional) is right at batch
  size 1; at larger ones it mixes the images of a batch. This layer does not. `mix_images=True`
  reproduces it, to evaluate weights that were trained with it; see `fullattn.layers.mixing`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fullattn import functional
from fullattn.attention import AttentionCall, BranchSizes, Operation
from fullattn.attention.dispatch import check_name
from fullattn.attention.sizes import Size, equal
from fullattn.layers import _checks, mixing
from fullattn.layers.protocol import AttentionLayer, Convolutions, Work

__all__ = ["FullyAttentional"]


class FullyAttentional(AttentionLayer):
    """Attention between channels with one C×C map per column and one per row.

    y = project( gamma · (columns + rows) + x ), where for the columns

        key[b, :, h] = Linear( mean over w of x[b, :, h, w] )
        similarity[b, w, i, j] = softmax_j( scale · Σ_h x[b, i, h, w] · key[b, j, h] )
        columns[b, i, h, w] = Σ_j similarity[b, w, i, j] · x[b, j, h, w]

    the rows are the same with H and W exchanged and a second Linear, and project is a 3x3
    convolution, normalisation and activation. H and W may have any size.

    Args:
        channels: C.
        scale: factor on the scores; None for 1/√H in the columns and 1/√W in the rows. The paper
            uses none (1.0).
        gamma_init: initial value of gamma. At the paper's 0 attention adds nothing at first.
        project: whether to end with the 3x3 convolution, normalisation and activation. Without
            it the layer starts as the identity, as needed in a pretrained network.
        mix_images: compare column w of image b with the context of image (b·W + w) mod B, and row
            h with that of (b·H + h) mod B, as the official implementation does; at B = 1 these are
            the image's own. Only for evaluating weights that were trained with that code at larger
            batches; the first such layer in a process warns.
        norm_layer: class or callable of the channel count for the projection's normalisation;
            None for none (the convolution then has a bias).
        act_layer: class or callable for the projection's activation; None for none.
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
        Song et al., AAAI 2022 (arXiv 2112.04108), section 3.

    Example:
        >>> import torch
        >>> layer = FullyAttentional(16, project=False)
        >>> x = torch.randn(2, 16, 9, 7)
        >>> torch.equal(layer(x), x)  # gamma starts at 0
        True
    """

    layer_name = "fully"
    paper = "Song et al., AAAI 2022 (arXiv 2112.04108)"
    gamma: nn.Parameter
    operation: ClassVar[Operation] = functional.AXIAL_CHANNEL_ATTENTION
    head_options: ClassVar[Mapping[str, Any]] = MappingProxyType({"project": False})

    def __init__(
        self,
        channels: int,
        *,
        scale: float | None = 1.0,
        gamma_init: float = 0.0,
        project: bool = True,
        mix_images: bool = False,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        act_layer: Callable[..., nn.Module] | None = nn.ReLU,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels: int = _checks.positive(channels, "channels")
        self.scale: float | None = _checks.scale(scale)
        self.gamma_init: float = _checks.number(gamma_init, "gamma_init")
        self.mix_images: bool = _checks.option(mix_images, "mix_images", (False, True))
        self.backend: str | None = check_name(backend)
        norm_layer = _checks.module_factory(norm_layer, "norm_layer")
        act_layer = _checks.module_factory(act_layer, "act_layer")
        like: dict[str, Any] = {"device": device, "dtype": dtype}

        self.column_key: nn.Linear = nn.Linear(channels, channels, **like)
        self.row_key: nn.Linear = nn.Linear(channels, channels, **like)
        self.gamma = nn.Parameter(torch.empty(1, **like))
        self.project: nn.Sequential | None = None
        if _checks.option(project, "project", (False, True)):
            steps: OrderedDict[str, nn.Module] = OrderedDict()
            steps["conv"] = nn.Conv2d(
                channels, channels, 3, padding=1, bias=norm_layer is None, **like
            )
            if norm_layer is not None:
                steps["norm"] = _checks.normalisation(norm_layer, channels, device, dtype)
            if act_layer is not None:
                steps["act"] = act_layer()
            self.project = nn.Sequential(steps)
        nn.init.constant_(self.gamma, self.gamma_init)
        if self.mix_images:
            mixing.warn()

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        super().reset_parameters()
        nn.init.constant_(self.gamma, self.gamma_init)

    def attention(self, x: Tensor) -> AttentionCall:
        """Compare every column with the mean column's keys, and every row with the mean row's."""
        x, mean_column, mean_row = functional.axial_means(x, self.backend)
        column_key = self.column_key(mean_column).transpose(1, 2)  # (B, C, H)
        row_key = self.row_key(mean_row).transpose(1, 2)  # (B, C, W)
        call = mixing.mixed_call if self.mix_images else functional.fully_attentional_call
        return call(x, column_key, row_key, scale=self.scale)

    @classmethod
    def untrained(cls, channels: int, scale: float) -> FullyAttentional:
        """Build a layer whose Linears are the identity."""
        layer = cls(channels, scale=scale, project=False)
        for linear in (layer.column_key, layer.row_key):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        return layer

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Project gamma · (columns + rows) + x."""
        return y if self.project is None else self.project(y)

    def work(self, shape: tuple[Size, Size, Size, Size], size: Size) -> Work:
        """Return the sizes of two Linears, attention over columns and rows, and the projection."""
        if self.mix_images:
            raise ValueError(
                "expected a layer without mix_images=True, for which there is no formula"
            )
        batch, channels, height, width = shape
        x = prod(shape) * size
        scale = 1.0 if self.scale is None else self.scale
        linear = channels * channels + channels
        keys = batch * channels * (height + width) * size
        projection = None
        if self.project is not None:
            normalised = hasattr(self.project, "norm")
            weights = 9 * channels * channels + (2 * channels if normalised else channels)
            # An im2col matrix in float64, otherwise copies in oneDNN's layout.
            double = equal(size, 8)
            projection = Convolutions(
                flops=18 * channels * prod(shape),
                weights=weights * size,
                workspace=double * 9 * x + (1 - double) * (x + weights * size),
                backward_workspace=2 * x + double * 7 * x,
                later=len(self.project) - 1,
                normalised=normalised,
            )
        return Work(
            branches=tuple(
                BranchSizes.of(cut, shape, shared_key=True, scale=scale)
                for cut in self.operation.cuts
            ),
            flops=2 * batch * channels * channels * (height + width),
            parameters=2 * linear + 1 + (0 if projection is None else projection.weights // size),
            inputs=keys,
            kept=keys * (2 if self.scale is None else 1),  # means, and keys before the scale
            gradients=keys + 2 * linear * size + x,  # of the keys, and of x through a mean
            branch_gradient=x,
            projection=projection,
        )
