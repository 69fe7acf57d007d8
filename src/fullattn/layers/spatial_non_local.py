"""The non-local block: attention with one map of positions for the whole image.

Wang et al., Non-local Neural Networks, CVPR 2018 (arXiv 1711.07971). The scores are sums over all
channels: the map keeps which position, and no channel. It has (H·W)² elements; the Gaussian and
dot-product forms are computed without building it, the concatenation form is not.

The position attention of Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019
(arXiv 1809.02983), is the same without the output convolution: `project=False`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullattn import functional
from fullattn.attention import AttentionCall, BranchSizes, Operation, ScoreFunction
from fullattn.attention.dispatch import check_name
from fullattn.attention.sizes import Size, maximum
from fullattn.attention.tracing import plain_shape
from fullattn.layers import _checks
from fullattn.layers.protocol import AttentionLayer, Convolutions, Work
from fullattn.reshape import POSITIONS

__all__ = ["SpatialNonLocal"]

Mode = Literal["embedded_gaussian", "gaussian", "dot_product", "concatenation"]

_SCORES: dict[Mode, ScoreFunction] = {
    "embedded_gaussian": ScoreFunction.SOFTMAX,
    "gaussian": ScoreFunction.SOFTMAX,
    "dot_product": ScoreFunction.DOT_PRODUCT,
    "concatenation": ScoreFunction.CONCATENATION,
}


class SpatialNonLocal(AttentionLayer):
    """Attention between positions with one HW×HW map for each image.

    y = x + output( attended ), where query, key and value are 1x1 convolutions of x to
    inner_channels, output is a 1x1 convolution back with a normalisation, and

        attended[b, :, p] = Σ_q similarity[b, p, q] · value[b, :, q]

    where the similarity depends on the mode:

        embedded_gaussian   similarity = softmax_q( scale · query[p] · key[q] )
        gaussian            the same with x itself as query and key
        dot_product         scale · query[p] · key[q] / (number of q)
        concatenation       ReLU( score · [query[p], key[q]] ) / (number of q)

    With `project=False` there is no output convolution: the value has all C channels, and

        y = gamma · attended + x

    Args:
        channels: C.
        inner_channels: channels of query, key and, with an output, value; None for the paper's
            C/2 (at least 1).
        mode: form of the similarity; the paper has all four.
        scale: factor on the scores; None for 1/√d with d the channels of a query. The paper uses
            none (1.0). Not used by mode "concatenation".
        subsample: max-pool key and value by this factor; the paper uses 2.
        project: whether to end with a 1x1 convolution back to C channels and a normalisation.
            Without it the layer is DANet's position attention, whose inner_channels are C/8.
        gamma_init: initial value of gamma, for project=False. At DANet's 0 the layer starts as the
            identity.
        norm_layer: class or callable of the channel count for the normalisation after the output
            convolution; None for none.
        zero_init: start the output's last layer at 0, so that the layer starts as the identity.
        backend: name of the attention backend; None for the automatic choice.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        x: (B, C, H, W) or (C, H, W), H and W of at least `subsample`.
        output: as x.

    Raises:
        ValueError: an invalid option, or an input of a wrong shape or device.
        TypeError: an option of a wrong type, or an input of a wrong dtype.

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

    layer_name = "spatial"
    paper = "Wang et al., CVPR 2018 (arXiv 1711.07971)"
    operation: ClassVar[Operation] = functional.POSITION_ATTENTION
    bench_options: ClassVar[Mapping[str, Any]] = MappingProxyType({"zero_init": False})

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
        self.channels: int = _checks.positive(channels, "channels")
        self.inner_channels: int = (
            max(1, self.channels // 2)
            if inner_channels is None
            else _checks.positive(inner_channels, "inner_channels")
        )
        self.mode: Mode = _checks.option(mode, "mode", tuple(_SCORES))
        self._score_function = _SCORES[self.mode]
        self.scale: float | None = _checks.scale(scale)
        self.subsample: int = _checks.positive(subsample, "subsample")
        project = _checks.option(project, "project", (False, True))
        self.gamma_init: float = _checks.number(gamma_init, "gamma_init")
        if project and self.gamma_init != 0.0:
            raise ValueError(f"gamma_init={gamma_init} is for project=False, got project=True")
        self.zero_init: bool = _checks.option(zero_init, "zero_init", (False, True))
        self.backend: str | None = check_name(backend)
        norm_layer = _checks.module_factory(norm_layer, "norm_layer")
        like: dict[str, Any] = {"device": device, "dtype": dtype}

        inner = self.inner_channels
        embedded = self.mode != "gaussian"
        self.query: nn.Conv2d | None = nn.Conv2d(channels, inner, 1, **like) if embedded else None
        self.key: nn.Conv2d | None = nn.Conv2d(channels, inner, 1, **like) if embedded else None
        self.value: nn.Conv2d = nn.Conv2d(channels, inner if project else channels, 1, **like)
        self.score: nn.Linear | None = None
        if self._score_function is ScoreFunction.CONCATENATION:
            self.score = nn.Linear(2 * inner, 1, bias=False, **like)
        self.output: nn.Sequential | None = None
        self.gamma = None
        if project:
            steps: OrderedDict[str, nn.Module] = OrderedDict()
            steps["conv"] = nn.Conv2d(inner, channels, 1, **like)
            if norm_layer is not None:
                steps["norm"] = _checks.normalisation(norm_layer, channels, device, dtype)
            self.output = nn.Sequential(steps)
        else:
            self.gamma = nn.Parameter(torch.empty(1, **like))
        self._reset_end()

    def _reset_end(self) -> None:
        """Initialise gamma, or the last layer of the output."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.gamma_init)
        if self.output is not None and self.zero_init:
            last = self.output[-1]
            for name in ("weight", "bias"):
                if isinstance(parameter := getattr(last, name, None), Tensor):
                    nn.init.zeros_(parameter)

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        super().reset_parameters()
        self._reset_end()

    def check(self, x: Tensor) -> tuple[Tensor, bool]:
        """Check an input, which must have at least `subsample` rows and columns."""
        # Not self.value.weight, which is a method in a quantised module and missing in an adapter.
        x, unbatched = _checks.feature_map(x, self.channels, self.value._parameters.get("weight"))
        self.check_size(plain_shape(x))
        return x, unbatched

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if H or W is less than `subsample`."""
        if shape[2] < self.subsample or shape[3] < self.subsample:
            raise ValueError(
                f"subsample={self.subsample} expects H and W of at least {self.subsample}, "
                f"got shape {tuple(shape)}"
            )

    def attention(self, x: Tensor) -> AttentionCall:
        """Compare the positions of the query with those of the (subsampled) key."""
        embed_query, embed_key, score_pairs = self.query, self.key, self.score
        query = x if embed_query is None else embed_query(x)
        key = x if embed_key is None else embed_key(x)
        value = self.value(x)
        if self.subsample != 1:
            key, value = (F.max_pool2d(each, self.subsample) for each in (key, value))
        if score_pairs is not None:
            query, key = self._scores(score_pairs, query, key)
        score = self._score_function
        return functional.spatial_call(query, key, value, score=score, scale=self.scale)

    @staticmethod
    def _scores(score: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the two parts, (B, 1, H, W) and (B, 1, H', W'), of score([query, key]).

        The module is called once, on [query, 0] for all queries, [0, key] for all keys and [0, 0],
        whose result is subtracted so that the bias of a replaced module counts once.
        """
        queries, keys = query.flatten(2).transpose(-2, -1), key.flatten(2).transpose(-2, -1)
        pairs = torch.cat(
            [F.pad(queries, (0, keys.shape[2])), F.pad(keys, (queries.shape[2], 0))], dim=1
        )
        scores = score(F.pad(pairs, (0, 0, 0, 1))).transpose(-2, -1)
        of_queries, of_keys, of_none = scores.split([queries.shape[1], keys.shape[1], 1], dim=2)
        return (
            (of_queries - of_none).reshape(query.shape[0], 1, *query.shape[2:]),
            of_keys.reshape(key.shape[0], 1, *key.shape[2:]),
        )

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the output convolution of y to x, or return y with project=False."""
        y, output = functional.ordered(y), self.output
        return y if output is None else x + output(y)

    @classmethod
    def untrained(cls, channels: int, scale: float) -> SpatialNonLocal:
        """Build a layer of the Gaussian mode, whose queries and keys are x itself."""
        return cls(channels, mode="gaussian", scale=scale)

    def option(self, name: str) -> Any:
        """Return None for the inner channels of the paper."""
        value = super().option(name)
        default = name == "inner_channels" and value == max(1, self.channels // 2)
        return None if default else value

    @property
    def project(self) -> nn.Sequential | None:
        """The output convolution; None with project=False."""
        return self.output

    def work(self, shape: tuple[Size, Size, Size, Size], size: Size) -> Work:
        """Return the sizes of convolutions, subsampling, attention and the output convolution."""
        batch, channels, height, width = shape
        default = self.option("inner_channels") is None
        inner = maximum(1, channels // 2) if default else self.inner_channels
        projected, embedded = self.output is not None, self.query is not None
        scored, step = self.score is not None, self.subsample
        value = inner if projected else channels
        features = inner if embedded else channels
        pooled_height, pooled_width = height // step, width // step
        positions, memory = height * width, pooled_height * pooled_width
        tokens = 1 if scored else features
        branch = BranchSizes.of(
            POSITIONS,
            (batch, tokens, height, width),
            (batch, tokens, pooled_height, pooled_width),
            (batch, value, pooled_height, pooled_width),
            score=self._score_function,
            scale=0.5 if self.scale is None else self.scale,
        )
        x = prod(shape) * size
        full, pooled = batch * positions * size, batch * memory * size
        queries: Size = inner * full if embedded else 0
        keys: Size = inner * full if embedded else 0
        values = value * full
        kept: Size = 0
        making: Size = 0
        if step > 1:
            indices = batch * memory * 8
            # Pooling saves its input and the indices of the maxima.
            kept = keys + features * indices + value * (full + indices)
            keys, values = features * pooled, value * pooled
            making = queries + keys + values + value * (full + indices)
        scores: Size = 0
        if scored:
            pairs = positions + memory + 1
            scores = 4 * batch * inner * pairs
            kept = kept + queries + keys + 2 * batch * inner * pairs * size
            queries, keys = full, pooled
            making = maximum(making, kept + 2 * batch * inner * pairs * size)
        convolved = (2 * inner if embedded else 0) + value
        weights = channels * inner * size
        grads = (features * full if embedded else 0) + (features + value) * pooled
        output = None
        if projected:
            normalised = hasattr(self.output, "norm")
            output = Convolutions(
                flops=2 * batch * channels * positions * inner,
                weights=weights,
                normalised=normalised,
            )
            grads = grads + 2 * x + 3 * weights
        else:
            grads = grads + 2 * x + 2 * weights + channels * channels * size
        parameters = convolved * (channels + 1) + (2 * inner if scored else 0)
        if output is not None:
            parameters = parameters + (inner + 1) * channels
            parameters = parameters + (2 * channels if output.normalised else 0)
        else:
            parameters = parameters + 1
        return Work(
            branches=(branch,),
            flops=2 * batch * channels * positions * convolved + scores,
            parameters=parameters,
            inputs=queries + keys + values,
            kept=kept,
            making=making,
            gradients=grads,
            output=output,
            output_inputs=inner * full,
        )
