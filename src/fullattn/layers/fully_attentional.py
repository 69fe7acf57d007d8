"""The fully attentional layer.

Song et al., Fully Attentional Network for Semantic Segmentation, AAAI 2022 (arXiv 2112.04108).

What to know before using it:
- The paper's layer has no 1/√d on the scores. `scale=None` turns one on.
- gamma starts at 0, so attention adds nothing until training moves it. With `project=False` the
  layer is then the identity; with the projection it is the projection alone.
- Widely copied public code pairs, for batches larger than one, each image with the context of
  another. This layer treats every image alone, and so differs from it except at batch size one.
  `mix_images=True` does as that code does, to evaluate weights that were trained with it.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fullattn import functional
from fullattn.functional import FullyAttentionalSimilarity
from fullattn.layers import _checks

__all__ = ["FullyAttentional"]


@cache
def _warn_of_mixing() -> None:
    """Warn the first time in a process."""
    warnings.warn(
        "mix_images=True: images of a batch influence each other, as in the copied public code; "
        "use it to evaluate weights that were trained with that code, and for nothing else",
        stacklevel=3,
    )


class FullyAttentional(nn.Module):
    """Attention between channels with a map of its own for every column and every row.

    y = project( gamma · (columns + rows) + x ), where for the columns

        key[b, :, h] = Linear( mean over w of x[b, :, h, w] )
        similarity[b, w, i, j] = softmax_j( scale · Σ_h x[b, i, h, w] · key[b, j, h] )
        columns[b, i, h, w] = Σ_j similarity[b, w, i, j] · x[b, j, h, w]

    the rows are the same with H and W exchanged and a second Linear, and project is a 3x3
    convolution, normalisation and activation. H and W are free and need not be equal.

    Args:
        channels: C.
        scale: factor on the scores; None for 1/√H in the columns and 1/√W in the rows. The paper
            uses none (1.0).
        gamma_init: initial value of gamma. At the paper's 0 attention adds nothing at first.
        project: whether to end with the 3x3 convolution, normalisation and activation. Without
            it the layer is the identity at initialisation: the form for a pretrained net.
        mix_images: compare column w of image b with the context of image (b·W + w) mod B, and row
            h with that of (b·H + h) mod B, as the copied public code does; at B = 1 they are the
            image's own. Only for evaluating weights that were trained with that code at larger
            batches; the first such layer warns.
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
        ValueError: an option or an input's shape or device does not fit; the message says what was
            expected and what came.
        TypeError: an option's type or an input's dtype does not fit.

    Source:
        Song et al., AAAI 2022 (arXiv 2112.04108), section 3.

    Example:
        >>> import torch
        >>> layer = FullyAttentional(16, project=False)
        >>> x = torch.randn(2, 16, 9, 7)
        >>> torch.equal(layer(x), x)  # gamma starts at 0
        True
    """

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
        self.channels = _checks.positive(channels, "channels")
        self.scale = _checks.scale(scale)
        self.gamma_init = _checks.number(gamma_init, "gamma_init")
        self.mix_images = _checks.option(mix_images, "mix_images", (False, True))
        self.backend = _checks.backend(backend)
        norm_layer = _checks.module_factory(norm_layer, "norm_layer")
        act_layer = _checks.module_factory(act_layer, "act_layer")
        like: dict[str, Any] = {"device": device, "dtype": dtype}

        self.column_key = nn.Linear(channels, channels, **like)
        self.row_key = nn.Linear(channels, channels, **like)
        self.gamma = nn.Parameter(torch.empty(1, **like))
        self.project: nn.Sequential | None = None
        if _checks.option(project, "project", (False, True)):
            steps: OrderedDict[str, nn.Module] = OrderedDict()
            steps["conv"] = nn.Conv2d(
                channels, channels, 3, padding=1, bias=norm_layer is None, **like
            )
            if norm_layer is not None:
                steps["norm"] = norm_layer(channels).to(device=device, dtype=dtype)
            if act_layer is not None:
                steps["act"] = act_layer()
            self.project = nn.Sequential(steps)
        nn.init.constant_(self.gamma, self.gamma_init)
        if self.mix_images:
            _warn_of_mixing()

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        nn.init.constant_(self.gamma, self.gamma_init)
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: feature map, (B, C, H, W) or (C, H, W).

        Returns:
            A tensor of x's shape and memory format.
        """
        x, unbatched = _checks.feature_map(x, self.channels, self.gamma)
        y = functional.fully_attentional(
            x,
            self.column_key.weight,
            self.row_key.weight,
            self.column_key.bias,
            self.row_key.bias,
            self.gamma,
            scale=self.scale,
            mix_images=self.mix_images,
            backend=self.backend,
        )
        if self.project is not None:
            y = self.project(y)
        return _checks.as_given(y, x, unbatched)

    def similarity(self, x: Tensor) -> FullyAttentionalSimilarity:
        """The similarity maps that `forward` multiplies with x, built to be looked at.

        Args:
            x: feature map, (B, C, H, W) or (C, H, W).

        Returns:
            columns (B, W, C, C) and rows (B, H, C, C), without B for an unbatched input.
        """
        x, unbatched = _checks.feature_map(x, self.channels, self.gamma)
        maps = functional.fully_attentional_similarity(
            x,
            self.column_key.weight,
            self.row_key.weight,
            self.column_key.bias,
            self.row_key.bias,
            scale=self.scale,
            mix_images=self.mix_images,
        )
        if unbatched:
            return FullyAttentionalSimilarity(maps.columns.squeeze(0), maps.rows.squeeze(0))
        return maps

    def extra_repr(self) -> str:
        """The options that differ from the paper's."""
        shown = [f"{self.channels}"]
        if self.scale != 1.0:
            shown.append(f"scale={self.scale}")
        if self.gamma_init != 0.0:
            shown.append(f"gamma_init={self.gamma_init}")
        if self.project is None:
            shown.append("project=False")
        if self.mix_images:
            shown.append("mix_images=True")
        if self.backend is not None:
            shown.append(f"backend={self.backend!r}")
        return ", ".join(shown)
