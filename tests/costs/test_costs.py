"""The formulas of `fullattn.costs` against PyTorch's FLOP counter and its record of allocations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fullattn
from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal, costs
from fullattn.attention import native
from fullattn.attention.dispatch import BACKENDS
from helpers.cases import peak_bytes

FLOAT32 = torch.float32
FORMS: dict[str, Callable[..., nn.Module]] = {
    "fully": FullyAttentional,
    "fully-bare": lambda c, **o: FullyAttentional(c, project=False, **o),
    "fully-scaled": lambda c, **o: FullyAttentional(c, project=False, scale=None, **o),
    "fully-convolution": lambda c, **o: FullyAttentional(c, norm_layer=None, act_layer=None, **o),
    "fully-no_act": lambda c, **o: FullyAttentional(c, act_layer=None, **o),
    "channel": ChannelNonLocal,
    "channel-scaled": lambda c, **o: ChannelNonLocal(c, scale=None, **o),
    "channel-least_similar": lambda c, **o: ChannelNonLocal(c, least_similar=True, **o),
    "spatial": SpatialNonLocal,
    "spatial-inner": lambda c, **o: SpatialNonLocal(c, inner_channels=7, norm_layer=None, **o),
    "spatial-subsampled": lambda c, **o: SpatialNonLocal(c, subsample=2, **o),
    "spatial-unprojected": lambda c, **o: SpatialNonLocal(c, project=False, **o),
    "spatial-danet": lambda c, **o: SpatialNonLocal(
        c, inner_channels=max(1, c // 8), project=False, subsample=2, scale=None, **o
    ),
    "dot_product-unprojected": lambda c, **o: SpatialNonLocal(
        c, inner_channels=max(1, c // 4), mode="dot_product", project=False, **o
    ),
    "gaussian": lambda c, **o: SpatialNonLocal(c, mode="gaussian", **o),
    "gaussian-subsampled": lambda c, **o: SpatialNonLocal(c, mode="gaussian", subsample=3, **o),
    "dot_product": lambda c, **o: SpatialNonLocal(c, mode="dot_product", **o),
    "concatenation": lambda c, **o: SpatialNonLocal(c, mode="concatenation", **o),
}
WITHOUT_CONVOLUTION = [name for name in FORMS if name.startswith(("fully-bare", "fully-s", "chan"))]

on_every_backend = pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])


def runs(backend: str, layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    try:
        costs.cost(layer, shape, dtype=dtype, backend=backend)
    except fullattn.BackendError:
        return False
    return True


def forms(backend: str, dtype: torch.dtype = FLOAT32, names: list[str] | None = None) -> list[str]:
    """Names of the forms that a backend runs here."""
    chosen = [name for name in names or FORMS if runs(backend, FORMS[name](4), (1, 4, 5, 6), dtype)]
    if not chosen:
        pytest.skip(f"{backend} does not run here in {dtype}")
    return chosen


@on_every_backend
def test_flops_are_those_that_pytorch_counts(backend: str) -> None:
    names = forms(backend)
    # einsum multiplies along an axis of length 1 element by element, which the counter leaves out.
    fewest, smallest = (16, 6) if backend == "reference" else (1, 3)

    @settings(max_examples=60)
    @given(
        name=st.sampled_from(names),
        batch=st.integers(1, 3),
        channels=st.integers(fewest, fewest + 16),
        height=st.integers(smallest, 13),
        width=st.integers(smallest, 13),
    )
    def check(name: str, batch: int, channels: int, height: int, width: int) -> None:
        shape = (batch, channels, height, width)
        layer = FORMS[name](channels)
        x = torch.randn(shape, requires_grad=True)
        with fullattn.backend(backend), FlopCounterMode(display=False) as forward:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        cost = costs.cost(layer, shape, backend=backend)
        assert cost.flops == forward.get_total_flops()
        assert cost.backward_flops == backward.get_total_flops()

    check()


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if not b.builds_map])
def test_a_fused_backend_computes_the_scores_once_more(backend: str) -> None:
    batch, channels, height, width = shape = (2, 24, 7, 9)
    layer = FullyAttentional(channels, project=False)
    if not runs(backend, layer, shape, FLOAT32):
        pytest.skip(f"{backend} does not run the layer here")
    scores = 2 * 2 * batch * channels**2 * height * width  # in both branches
    fused, reference = (costs.cost(layer, shape, backend=name) for name in (backend, "reference"))
    assert fused.flops == reference.flops
    assert fused.backward_flops == reference.backward_flops + scores


def check_memory(
    name: str,
    shape: tuple[int, ...],
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    more: int = 0,
) -> None:
    """Compare with PyTorch's record, which may be larger by `more` bytes."""
    layer = FORMS[name](shape[1])
    cost = costs.cost(layer, shape, dtype=dtype, backend=backend)
    measured = dict(
        zip(("inference", "training"), peak_bytes(layer, shape, backend, dtype), strict=True)
    )
    for mode, peak in measured.items():
        formula = getattr(cost, f"{mode}_bytes")
        slack = max(50_000, tolerance * peak)
        assert -slack <= peak - formula <= slack + more, (mode, formula, peak)


@pytest.fixture
def recorded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave out what PyTorch's record does not have, or has for each thread.

    The C kernel's workspace comes from malloc; PyTorch's convolutions take more with more threads.
    """
    monkeypatch.setattr(native, "kernel_workspace", lambda shape, threads: (0, 0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@on_every_backend
@pytest.mark.usefixtures("recorded_memory")
def test_memory_is_what_pytorch_allocates(backend: str) -> None:
    names = forms(backend)
    # oneDNN convolves whole vectors of channels, and leaves maps of under 20,480 numbers to others.

    @settings(max_examples=40)
    @given(
        name=st.sampled_from(names),
        batch=st.integers(1, 3),
        channels=st.integers(2, 8).map(lambda n: 16 * n),
        height=st.integers(26, 48),
        width=st.integers(26, 48),
    )
    def check(name: str, batch: int, channels: int, height: int, width: int) -> None:
        check_memory(name, (batch, channels, height, width), backend, FLOAT32, 0.1)

    check()


@on_every_backend
@pytest.mark.usefixtures("recorded_memory")
def test_memory_in_half_precision_is_what_pytorch_allocates(backend: str) -> None:
    # Convolutions in half precision take workspace in oneDNN that depends on the processor, and SDPA
    # packs queries, keys and values where it has matrix units.
    names = forms(backend, torch.bfloat16, WITHOUT_CONVOLUTION)
    packs = backend == "sdpa" and torch.cpu._is_amx_tile_supported()

    @given(
        name=st.sampled_from(names),
        batch=st.integers(1, 2),
        channels=st.integers(48, 128),
        height=st.integers(20, 48),
        width=st.integers(20, 48),
    )
    def check(name: str, batch: int, channels: int, height: int, width: int) -> None:
        shape = (batch, channels, height, width)
        packed = 3 * 2 * prod(shape) if packs else 0
        check_memory(name, shape, backend, torch.bfloat16, 0.15, packed)

    check()


@pytest.mark.parametrize("name", ["fully-bare", "spatial", "dot_product"])
def test_without_a_map_inference_memory_grows_with_the_positions_alone(name: str) -> None:
    layer = FORMS[name](512, device="meta")
    small = costs.cost(layer, (1, 512, 64, 64))
    large = costs.cost(layer, (1, 512, 128, 128))
    assert small.map_numel * (16 if name != "fully-bare" else 2) == large.map_numel
    assert large.inference_bytes <= 4.4 * small.inference_bytes


@pytest.mark.parametrize("name", FORMS)
def test_map_numbers_are_those_of_the_similarity_maps(name: str) -> None:
    layer, x = FORMS[name](6), torch.randn(2, 6, 7, 5, dtype=torch.bfloat16)
    maps = layer.to(x.dtype).similarity(x)
    maps = maps if isinstance(maps, tuple) else (maps,)
    cost = costs.cost(layer, x.shape, dtype=x.dtype)
    assert cost.map_numel == sum(m.numel() for m in maps)
    assert cost.map_bytes == sum(m.numel() * m.itemsize for m in maps)


@pytest.mark.parametrize("name", FORMS)
def test_a_layer_on_the_meta_device_costs_the_same(name: str) -> None:
    shape = (2, 16, 9, 11)
    real, meta = FORMS[name](16), FORMS[name](16, device="meta")
    assert costs.cost(real, shape) == costs.cost(meta, shape)
    assert costs.cost(real, shape).parameters == sum(p.numel() for p in real.parameters())


def test_the_backend_is_the_one_that_would_run() -> None:
    x = torch.randn(1, 64, 24, 24)
    layer = FullyAttentional(64, project=False)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    automatic = costs.cost(layer, x.shape)
    assert automatic.flops == counter.get_total_flops()
    assert automatic.backend == BACKENDS[0].name or BACKENDS[0].unavailable() is not None
    assert costs.cost(ChannelNonLocal(64), x.shape).backend == "reference"
    chosen = FullyAttentional(64, backend="sdpa")
    assert costs.cost(chosen, x.shape).backend == "sdpa"
    assert costs.cost(chosen, x.shape, backend="chunked").backend == "chunked"
    assert costs.cost(chosen, x.shape, device="cuda").backend == "sdpa"
    with fullattn.backend("reference"):
        assert costs.cost(chosen, x.shape).backend == "reference"
        assert costs.cost(chosen, x.shape, backend="chunked").backend == "chunked"


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "expected one of FullyAttentional", (nn.Conv2d(4, 4, 1), (1, 4, 5, 5)), {}),
        (ValueError, r"expected a shape \(B, 4, H, W\)", (ChannelNonLocal(4), (4, 5, 5)), {}),
        (ValueError, "expected 4 channels", (ChannelNonLocal(4), (1, 5, 5, 5)), {}),
        (ValueError, "H of shape .* positive", (ChannelNonLocal(4), (1, 4, 0, 5)), {}),
        (TypeError, "W of shape .* integer", (ChannelNonLocal(4), (1, 4, 5, 5.5)), {}),
        (ValueError, "subsample=2", (SpatialNonLocal(4, subsample=2), (1, 4, 1, 5)), {}),
        (TypeError, "dtype", (ChannelNonLocal(4), (1, 4, 5, 5)), {"dtype": torch.int64}),
        (ValueError, "must be one of", (ChannelNonLocal(4), (1, 4, 5, 5)), {"backend": "none"}),
        (
            fullattn.BackendError,
            "cannot run",
            (ChannelNonLocal(4), (1, 4, 5, 5)),
            {"backend": "linear"},
        ),
        (
            fullattn.BackendError,
            "not on cuda",
            (ChannelNonLocal(4), (1, 4, 5, 5)),
            {"backend": "chunked", "device": "cuda"},
        ),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    error: type[Exception], message: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message) as caught:
        costs.cost(*arguments, **options)
    assert "\n" not in str(caught.value)


COUNT = """
import torch
{imports}
assert ("torch.utils.flop_counter" in __import__("sys").modules) == {loaded}
from torch.utils.flop_counter import FlopCounterMode
layer, x = fullattn.FullyAttentional(8, project=False), torch.randn(1, 8, 6, 5)
for backend in "chunked", "sdpa":
    with fullattn.backend(backend), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 8 * 8 * 8 * 30 + 2 * 8 * 8 * 11, backend
"""


@pytest.mark.parametrize(
    ("imports", "loaded"),
    [("import fullattn", False), ("import torch.utils.flop_counter\nimport fullattn", True)],
)
def test_the_counter_knows_our_operators_whichever_is_imported_first(
    imports: str, loaded: bool
) -> None:
    program = COUNT.format(imports=imports, loaded=loaded)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_formula_that_pytorch_has_of_its_own_is_left_alone() -> None:
    from torch.utils.flop_counter import flop_registry

    from fullattn.attention import flops

    own = flop_registry[torch.ops.aten.mm]
    flops.register(torch.ops.aten.mm, flops.attend)
    assert flop_registry[torch.ops.aten.mm] is own
