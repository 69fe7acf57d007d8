"""The spatial non-local layer: one map of positions.

Wang et al., Non-local Neural Networks, CVPR 2018 (arXiv 1711.07971). What it loses is *which
channel*: the map is a sum over all channels. The map has (H·W)² numbers, so the Gaussian and
dot-product forms run without building it; the concatenation form has to.

The position attention of Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019
(arXiv 1809.02983), is the same without the output convolution: `project=False`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullattn import functional
from fullattn.attention import Kind
from fullattn.layers import _checks

__all__ = ["SpatialNonLocal"]

Mode = Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"]

_KINDS: dict[Mode, Kind] = {
    "embedded_gaussian": Kind.SOFTMAX,
    "gaussian": Kind.SOFTMAX,
    "dot_product": Kind.DOT_PRODUCT,
    "concatenation": Kind.CONCATENATION,
}


class SpatialNonLocal(nn.Module):
    """Attention between positions with one HW×HW map for each image.

    y = x + output( attended ), where query, key and value are 1x1 convolutions of x to
    inner_channels, output is a 1x1 convolution back with a normalisation, and

        attended[b, :, p] = Σ_q similarity[b, p, q] · value[b, :, q]

    with, in the four modes of the paper,

        embedded_gaussian   similarity = softmax_q( scale · query[p] · key[q] )
        gaussian            the same with x itself as query and key
        dot_product         scale · query[p] · key[q] / (number of q)
        concatenation       ReLU( score · [query[p], key[q]] ) / (number of q)

    With `project=False` there is no output: the value has all C channels, and

        y = gamma · attended + x

    Args:
        channels: C.
        inner_channels: channels of query, key and, with an output, value; None for the paper's
            C/2 (at least 1).
        mode: form of the similarity.
        scale: factor on the scores; None for 1/√d with d the channels of a query. The paper uses
            none (1.0). Not used by mode "concatenation".
        subsample: max-pool key and value by this factor; the paper's trick uses 2.
        project: whether there is an output: a 1x1 convolution back to C channels with its
            normalisation. Without it the layer is DANet's position attention, whose
            inner_channels are C/8.
        gamma_init: initial value of gamma, which only the form without output has. At DANet's 0
            the layer is the identity at first.
        norm_layer: class or callable of the channel count for the normalisation after the output
            convolution; None for none.
        zero_init: start the output's last layer at 0, so that the layer is the identity at first.
        backend: name of the attention backend; None for the automatic choice.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        x: (B, C, H, W) or (C, H, W), H and W of at least `subsample`.
        output: as x.

    Raises:
        ValueError: an option or an input's shape or device does not fit; the message says what was
            expected and what came.
        TypeError: an option's type or an input's dtype does not fit.

    Source:
        Wang et al., CVPR 2018 (arXiv 1711.07971), sections 3 and 4.1; without output Fu et al.,
        CVPR 2019 (arXiv 1809.02983), section 3.2.

    Example:
        >>> import torch
        >>> layer = SpatialNonLocal(16, inner_channels=8)
        >>> x = torch.randn(2, 16, 9, 7)
        >>> torch.equal(layer(x), x)  # the output starts at 0
        True
        >>> SpatialNonLocal(16, inner_channels=2, project=False)(x).shape  # DANet's
        torch.Size([2, 16, 9, 7])
    """

    def __init__(
        self,
        channels: int,
        *,
        inner_channels: int | None = None,
        mode: Mode = "embedded_gaussian",
        scale: float | None = 1.0,
        subsample: int = 1,
        project: bool = True,
        gamma_init: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        zero_init: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = _checks.positive(channels, "channels")
        default_inner = max(1, self.channels // 2)
        self.inner_channels = (
            default_inner
            if inner_channels is None
            else _checks.positive(inner_channels, "inner_channels")
        )
        self.mode: Mode = _checks.option(mode, "mode", tuple(_KINDS))
        self._kind = _KINDS[self.mode]
        self.scale = _checks.scale(scale)
        self.subsample = _checks.positive(subsample, "subsample")
        project = _checks.option(project, "project", (False, True))
        self.gamma_init = _checks.number(gamma_init, "gamma_init")
        if project and self.gamma_init != 0.0:
            raise ValueError(f"gamma_init={gamma_init} is for project=False, got project=True")
        self.zero_init = _checks.option(zero_init, "zero_init", (False, True))
        self.backend = _checks.backend(backend)
        norm_layer = _checks.module_factory(norm_layer, "norm_layer")
        like: dict[str, Any] = {"device": device, "dtype": dtype}

        inner = self.inner_channels
        embedded = self.mode != "gaussian"
        self.query = nn.Conv2d(channels, inner, 1, **like) if embedded else None
        self.key = nn.Conv2d(channels, inner, 1, **like) if embedded else None
        self.value = nn.Conv2d(channels, inner if project else channels, 1, **like)
        self.score: nn.Linear | None = None
        if self._kind is Kind.CONCATENATION:
            self.score = nn.Linear(2 * inner, 1, bias=False, **like)
        self.output: nn.Sequential | None = None
        self.gamma: nn.Parameter | None = None
        if project:
            steps: OrderedDict[str, nn.Module] = OrderedDict()
            steps["conv"] = nn.Conv2d(inner, channels, 1, **like)
            if norm_layer is not None:
                steps["norm"] = norm_layer(channels).to(device=device, dtype=dtype)
            self.output = nn.Sequential(steps)
        else:
            self.gamma = nn.Parameter(torch.empty(1, **like))
        self._reset_end()

    def _reset_end(self) -> None:
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.gamma_init)
        if self.output is not None and self.zero_init:
            last = self.output[-1]
            for name in ("weight", "bias"):
                if isinstance(parameter := getattr(last, name, None), Tensor):
                    nn.init.zeros_(parameter)

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self._reset_end()

    def _check(self, x: Tensor) -> tuple[Tensor, bool]:
        x, unbatched = _checks.feature_map(x, self.channels, self.value.weight)
        if x.shape[2] < self.subsample or x.shape[3] < self.subsample:
            raise ValueError(
                f"subsample={self.subsample} expects H and W of at least {self.subsample}, "
                f"got shape {tuple(x.shape)}"
            )
        return x, unbatched

    def _similarity_weights(self) -> dict[str, Tensor | None]:
        return {
            "query_weight": None if self.query is None else self.query.weight,
            "query_bias": None if self.query is None else self.query.bias,
            "key_weight": None if self.key is None else self.key.weight,
            "key_bias": None if self.key is None else self.key.bias,
            "score_weight": None if self.score is None else self.score.weight.squeeze(0),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: feature map, (B, C, H, W) or (C, H, W).

        Returns:
            A tensor of x's shape and memory format.
        """
        x, unbatched = self._check(x)
        y = functional.spatial_non_local(
            x,
            self.value.weight,
            self.value.bias,
            **self._similarity_weights(),
            gamma=self.gamma,
            kind=self._kind,
            scale=self.scale,
            subsample=self.subsample,
            backend=self.backend,
        )
        if self.output is not None:
            y = x + self.output(y)
        return _checks.as_given(y, x, unbatched)

    def similarity(self, x: Tensor) -> Tensor:
        """The similarity map that `forward` multiplies with the values, built to be looked at.

        Args:
            x: feature map, (B, C, H, W) or (C, H, W).

        Returns:
            (B, H·W, H'·W'), with H' and W' after subsampling; without B for an unbatched input.
        """
        x, unbatched = self._check(x)
        maps = functional.spatial_similarity(
            x,
            **self._similarity_weights(),
            kind=self._kind,
            scale=self.scale,
            subsample=self.subsample,
        )
        return maps.squeeze(0) if unbatched else maps

    def extra_repr(self) -> str:
        """The options that differ from the paper's."""
        shown = [f"{self.channels}"]
        if self.inner_channels != max(1, self.channels // 2):
            shown.append(f"inner_channels={self.inner_channels}")
        if self.mode != "embedded_gaussian":
            shown.append(f"mode={self.mode!r}")
        if self.scale != 1.0:
            shown.append(f"scale={self.scale}")
        if self.subsample != 1:
            shown.append(f"subsample={self.subsample}")
        if self.output is None:
            shown.append("project=False")
        if self.gamma_init != 0.0:
            shown.append(f"gamma_init={self.gamma_init}")
        if not self.zero_init:
            shown.append("zero_init=False")
        if self.backend is not None:
            shown.append(f"backend={self.backend!r}")
        return ", ".join(shown)
