"""What the parametrised suites share: layers, backends that run them, drawn inputs, tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fullattn
from fullattn import costs
from fullattn.attention import AttentionInputs, Backend, ScoreFunction
from fullattn.attention.dispatch import BACKENDS
from helpers import oracle

# By how much a result may differ from the exact one, relative to the largest number of the exact
# one. From the dtype alone; the same on every machine, for every backend and layer.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def assert_near(
    actual: Tensor,
    expected: Tensor | np.ndarray[Any, Any],
    dtype: torch.dtype,
    *,
    size: float = 0.0,
    what: str = "result",
) -> None:
    """Fail unless actual is expected within the dtype's tolerance.

    Args:
        actual: what came.
        expected: the exact numbers.
        dtype: dtype of the computation, which decides the tolerance.
        size: judge the error against this number where all of expected is smaller: for gradients
            that cancel to nothing.
        what: name for the message.
    """
    exact = torch.as_tensor(expected).detach().double().cpu()
    given = actual.detach().double().cpu()
    assert given.shape == exact.shape, f"{what}: {tuple(given.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert given.isfinite().all(), f"{what} is not finite"
    error = (given - exact).abs().max().item()
    largest = max(exact.abs().max().item(), size)
    assert error <= TOLERANCE[dtype] * largest, (
        f"{what}: off by {error:.3g} where the largest number is {largest:.3g}"
    )


def arrays(*tensors: Tensor | None) -> list[Any]:
    """Tensors as float64 arrays for the oracle."""
    return [None if x is None else x.detach().double().cpu().numpy() for x in tensors]


@dataclass(frozen=True)
class Case:
    """A layer in one of its forms, and its oracle.

    Attributes:
        name: for the test's id.
        layer: the class.
        options: what makes the form, and what leaves out parts that are PyTorch's own.
        score: how its scores become weights.
        maps: the layer's similarity maps by the oracle, from (layer, x).
        attended: the layer's result before gamma, output and residual, from (layer, x, maps).
        scalable: whether the form has a scale.
    """

    name: str
    layer: type[nn.Module]
    options: dict[str, Any]
    score: ScoreFunction
    maps: Callable[[Any, Any], list[Any]]
    attended: Callable[[Any, Any, list[Any]], Any]
    scalable: bool = True

    def build(
        self, channels: int, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
    ) -> Any:
        """The layer with parameters drawn by its own initialisation; CPU, train mode."""
        torch.manual_seed(seed)
        return self.layer(channels, **{**self.options, **options}).to(dtype)

    def expected(self, layer: Any, x: Tensor) -> Any:
        """The layer's whole forward by the oracle, for the forms in `CASES`."""
        (image,) = arrays(x)
        attended = self.attended(layer, image, self.maps(layer, image))
        if layer.gamma is not None:
            return layer.gamma.item() * attended + image
        weight, bias = arrays(layer.output.conv.weight[:, :, 0, 0], layer.output.conv.bias)
        return image + oracle.convolution_1x1(attended, weight, bias)

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> AttentionInputs:
        """What the layer asks of a backend, at some size."""
        layer = self.layer(2, device="meta", **self.options)
        return costs.inputs_of(layer, (1, 2, 3, 4), dtype, device)


def _fully_attentional_maps(layer: Any, x: Any) -> list[Any]:
    weights = arrays(
        layer.column_key.weight, layer.column_key.bias, layer.row_key.weight, layer.row_key.bias
    )
    return list(oracle.fully_attentional_maps(x, *weights, layer.scale))


def _fully_attentional_attended(layer: Any, x: Any, maps: list[Any]) -> Any:
    return oracle.fully_attentional_attended(x, *maps)


def _channel_maps(layer: Any, x: Any) -> list[Any]:
    return [oracle.channel_map(x, layer.scale, layer.least_similar)]


def _channel_attended(layer: Any, x: Any, maps: list[Any]) -> Any:
    return oracle.channel_attended(x, *maps)


def _spatial_convolution(layer: Any, name: str, x: Any) -> Any:
    convolution = getattr(layer, name)
    if convolution is None:
        return x
    weight, bias = arrays(convolution.weight[:, :, 0, 0], convolution.bias)
    return oracle.convolution_1x1(x, weight, bias)


def _spatial_maps(layer: Any, x: Any) -> list[Any]:
    query = _spatial_convolution(layer, "query", x)
    key = oracle.max_pool(_spatial_convolution(layer, "key", x), layer.subsample)
    (score,) = arrays(None if layer.score is None else layer.score.weight[0])
    return [oracle.spatial_map(query, key, layer.mode, layer.scale, score)]


def _spatial_attended(layer: Any, x: Any, maps: list[Any]) -> Any:
    value = oracle.max_pool(_spatial_convolution(layer, "value", x), layer.subsample)
    return oracle.spatial_attended(value, *maps, *x.shape[2:])


def _spatial(mode: str, score: ScoreFunction, **options: Any) -> Case:
    return Case(
        "-".join(["spatial", mode, *options]),
        fullattn.SpatialNonLocal,
        {"mode": mode, "norm_layer": None, "zero_init": False, **options},
        score,
        _spatial_maps,
        _spatial_attended,
        scalable=mode != "concatenation",
    )


FULLY_ATTENTIONAL = Case(
    "fully_attentional",
    fullattn.FullyAttentional,
    {"project": False, "gamma_init": 0.7},
    ScoreFunction.SOFTMAX,
    _fully_attentional_maps,
    _fully_attentional_attended,
)
CHANNEL = Case(
    "channel",
    fullattn.ChannelNonLocal,
    {"gamma_init": 0.7},
    ScoreFunction.SOFTMAX,
    _channel_maps,
    _channel_attended,
)
CHANNEL_LEAST_SIMILAR = Case(
    "channel-least_similar",
    fullattn.ChannelNonLocal,
    {"gamma_init": 0.7, "least_similar": True},
    ScoreFunction.SOFTMAX,
    _channel_maps,
    _channel_attended,
)
SPATIAL = _spatial("embedded_gaussian", ScoreFunction.SOFTMAX)
SPATIAL_GAUSSIAN = _spatial("gaussian", ScoreFunction.SOFTMAX)
SPATIAL_DOT_PRODUCT = _spatial("dot_product", ScoreFunction.DOT_PRODUCT)
SPATIAL_CONCATENATION = _spatial("concatenation", ScoreFunction.CONCATENATION)
SPATIAL_SUBSAMPLED = _spatial("embedded_gaussian", ScoreFunction.SOFTMAX, subsample=2)
SPATIAL_UNPROJECTED = _spatial(
    "embedded_gaussian", ScoreFunction.SOFTMAX, project=False, gamma_init=0.7
)

CASES = (
    FULLY_ATTENTIONAL,
    CHANNEL,
    CHANNEL_LEAST_SIMILAR,
    SPATIAL,
    SPATIAL_GAUSSIAN,
    SPATIAL_DOT_PRODUCT,
    SPATIAL_CONCATENATION,
    SPATIAL_SUBSAMPLED,
    SPATIAL_UNPROJECTED,
)
CHANNEL_CASES = (CHANNEL, CHANNEL_LEAST_SIMILAR)
SPATIAL_CASES = CASES[3:]
SOFTMAX_CASES = tuple(case for case in CASES if case.score is ScoreFunction.SOFTMAX)


@dataclass(frozen=True)
class Run:
    """A layer on one backend, in one dtype, on one device."""

    case: Case
    backend: Backend
    dtype: torch.dtype
    device: str

    def build(self, channels: int, seed: int = 0, **options: Any) -> Any:
        """The case's layer in this run's dtype and on its device."""
        return self.case.build(channels, self.dtype, seed, **options).to(self.device)

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Make every layer run on this run's backend."""
        with fullattn.backend(self.backend.name):
            yield

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """layer(x) on this run's backend."""
        with self.forced():
            y: Tensor = layer(x)
        return y


DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def runs(
    *dtypes: torch.dtype,
    cases: Iterable[Case] = CASES,
    only: Callable[[Backend], bool] = lambda backend: True,
) -> Any:
    """Parametrise a test over every layer, backend and device that fit together.

    Args:
        dtypes: dtypes to run in; none for the most exact one that the backend takes.
        cases: which layers.
        only: which backends.

    Returns:
        A decorator that gives the test a `run`. Runs that a backend's declared limits exclude are
        left out; those that it cannot do on this machine are skipped with its reason.
    """
    parameters = []
    for case in cases:
        for backend in filter(only, BACKENDS):
            for device in DEVICES:
                for dtype in dtypes or (torch.float64, torch.float32):
                    reason = _why_not(backend, case.inputs(dtype, device))
                    if reason is None:
                        continue
                    name = str(dtype).removeprefix("torch.")
                    marks = [pytest.mark.skip(reason=f"{backend.name}: {reason}")] if reason else []
                    parameters.append(
                        pytest.param(
                            Run(case, backend, dtype, device),
                            id=f"{case.name}-{backend.name}-{name}"
                            + ("" if device == "cpu" else f"-{device}"),
                            marks=marks,
                        )
                    )
                    if not dtypes:
                        break
    return pytest.mark.parametrize("run", parameters)


def _why_not(backend: Backend, inputs: AttentionInputs) -> str | None:
    """'' if a backend runs inputs, None if its declared limits exclude it, else the reason."""
    reasons = backend.reasons_against(inputs)
    if not reasons:
        return ""
    # `unavailable` is asked last, when no declared limit speaks against the inputs.
    return reasons[0] if reasons == [backend.unavailable()] else None


def fuses(backend: Backend) -> bool:
    """Whether a backend runs without the map in memory."""
    return not backend.builds_map


@dataclass(frozen=True)
class Drawn:
    """A feature map that hypothesis drew: its shape, and how its numbers come about."""

    batch: int
    channels: int
    height: int
    width: int
    seed: int
    factor: float
    scale: float | None

    def options(self, case: Case) -> dict[str, Any]:
        """Options for the case's layer."""
        return {"scale": self.scale} if case.scalable else {}

    def x(self, run: Run) -> Tensor:
        """Normal numbers times the factor.

        Scores of 10⁴ are off by 10⁻³ in float32 before any softmax sees them, whatever computes
        them, so large factors are for float64. test_precision has large values for all dtypes.
        """
        factor = self.factor if run.dtype == torch.float64 else min(self.factor, 1.0)
        generator = torch.Generator().manual_seed(self.seed)
        smallest = run.case.options.get("subsample", 1)
        height, width = max(self.height, smallest), max(self.width, smallest)
        shape = (self.batch, self.channels, height, width)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * factor
        return x.to(run.device, run.dtype)


# 1, primes, powers of two, and numbers that are not multiples of 8; H and W are drawn apart.
CHANNELS = (1, 2, 3, 5, 8, 11, 16, 17)
SIZES = (1, 2, 3, 5, 7, 8, 11, 13)


@st.composite
def feature_maps(
    draw: st.DrawFn,
    *,
    batches: tuple[int, ...] = (1, 2, 3),
    factors: tuple[float, ...] = (1.0, 0.1, 10.0),
) -> Drawn:
    """Draw a feature map.

    Args:
        draw: hypothesis.
        batches: B.
        factors: what normal numbers are multiplied with.

    Returns:
        The drawn feature map.
    """
    return Drawn(
        batch=draw(st.sampled_from(batches)),
        channels=draw(st.sampled_from(CHANNELS)),
        height=draw(st.sampled_from(SIZES)),
        width=draw(st.sampled_from(SIZES)),
        seed=draw(st.integers(0, 2**31)),
        factor=draw(st.sampled_from(factors)),
        scale=draw(st.sampled_from([1.0, None, -0.5, 0.1])),
    )


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Collects the peak of the bytes that PyTorch allocates inside, over those at the start."""
    peak: list[int] = []
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield peak
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    peak.append(top)


def peak_bytes(
    layer: nn.Module, shape: tuple[int, ...], backend: str, dtype: torch.dtype
) -> tuple[int, int]:
    """Peak bytes in inference and in training."""
    layer = layer.to(dtype)
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    with fullattn.backend(backend):
        with torch.no_grad(), allocations() as inference:
            y = layer(x)
        del y
        x.requires_grad_()
        with allocations() as training:
            y = layer(x)
            y.backward(grad)
    return inference[0], training[0]
