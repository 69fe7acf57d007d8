"""The formulas of the site's cost explorer are those of `fullattn.costs`, figure by figure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import explorer
import fullattn
from fullattn import costs
from fullattn.attention import dispatch, sdpa
from fullattn.layers import LAYERS
from helpers import ROOT

SCRIPT = ROOT / "docs" / "javascripts" / "costs.js"
BACKENDS = ("automatic", *dispatch.backend_names())
DTYPES = ("float32", "bfloat16", "float16")
FIGURES = [
    "backend",
    "parameters",
    "flops",
    "backward_flops",
    "map_numel",
    "map_bytes",
    "inference_bytes",
    "training_bytes",
]
PRESETS = [
    (1, 512, 97, 97),
    (1, 512, 128, 256),
    (4, 128, 64, 64),
    (1, 64, 16, 16),
    (8, 512, 96, 96),
]
# Where a rule changes over: rows of a block of sdpa at 192 and 768 tokens, triton's 512 features,
# its window and number of programs, a block of chunked smaller than one map, the sliders' far end.
EDGES = [
    (1, 192, 12, 16),
    (1, 768, 24, 32),
    (1, 8, 512, 4),
    (1, 8, 4, 513),
    (2, 1056, 26, 192),
    (2, 1494, 209, 1),
    (32, 2048, 256, 256),
]


@pytest.fixture(scope="module")
def in_the_page() -> Callable[..., Any]:
    """What the page's script answers, run in V8."""
    racer = pytest.importorskip("py_mini_racer", reason="needs mini-racer: a V8 to run scripts in")
    context = racer.MiniRacer()
    context.eval(explorer.script() + SCRIPT.read_text("utf-8"))

    def ask(**setting: Any) -> Any:
        return json.loads(
            context.eval(f"JSON.stringify(fullattnCosts.cost({json.dumps(setting)}))")
        )

    return ask


@pytest.fixture(autouse=True)
def _everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python answers as where there is a compiler, a GPU and Triton, outside of its interpreter."""
    devices = {"triton": frozenset({"cuda"}), "native": frozenset({"cpu"})}
    there = {
        entry.name: replace(
            entry, unavailable=lambda: None, devices=devices.get(entry.name, entry.devices)
        )
        for entry in dispatch.BACKENDS
    }
    monkeypatch.setattr(dispatch, "_from_environment", None)
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(there.values()))
    monkeypatch.setattr(dispatch, "_BY_NAME", there)
    for name in ("FUSED_SLICES", "FUSED_SLICE"):
        fused = tuple(there[entry.name] for entry in getattr(dispatch, name))
        monkeypatch.setattr(dispatch, name, fused)


def _in_python(
    layer: str,
    shape: tuple[int, int, int, int],
    dtype: str,
    device: str,
    threads: int,
    backend: str,
    project: bool,
) -> dict[str, Any] | None:
    options = {} if project else LAYERS[layer].head_options
    module = LAYERS[layer](shape[1], device="meta", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        try:
            cost = costs.cost(
                module,
                shape,
                dtype=getattr(torch, dtype),
                device=device,
                backend=None if backend == "automatic" else backend,
            )
        except fullattn.BackendError:
            return None
    return {name: getattr(cost, name) for name in FIGURES}


def _compare(ask: Callable[..., Any], layer: str, shape: tuple[int, ...], **setting: Any) -> bool:
    """Compare one setting; whether the backend runs it."""
    found = ask(
        layer=layer,
        **dict(zip(("batch", "channels", "height", "width"), shape, strict=True)),
        **setting,
    )
    expected = _in_python(layer, shape, **setting)  # type: ignore[arg-type]
    if expected is None:
        assert found.keys() == {"reason"}, (layer, shape, setting)
        assert setting["backend"] in found["reason"]
        return False
    assert found == expected, (layer, shape, setting)
    return True


@pytest.mark.parametrize("shape", PRESETS + EDGES, ids=str)
def test_presets_and_edges_are_those_of_python(in_the_page: Callable[..., Any], shape: Any) -> None:
    for layer in LAYERS:
        for backend in BACKENDS:
            for device in ("cpu", "cuda"):
                # With many threads their buffers decide the peak.
                for dtype, threads in (("float32", 2), ("bfloat16", 2), ("float32", 256)):
                    setting: dict[str, Any] = {
                        "dtype": dtype,
                        "device": device,
                        "threads": threads,
                        "backend": backend,
                        "project": threads == 2 and backend == "sdpa",
                    }
                    _compare(in_the_page, layer, shape, **setting)


@pytest.mark.parametrize("layer", LAYERS)
def test_any_setting_is_that_of_python(in_the_page: Callable[..., Any], layer: str) -> None:
    compared: Counter[tuple[str, str]] = Counter()
    length = st.one_of(
        st.integers(1, 20), st.integers(21, 300), st.sampled_from([16, 97, 128, 600])
    )

    @settings(max_examples=200)
    @given(
        batch=st.integers(1, 9),
        channels=st.one_of(st.integers(1, 40), st.integers(41, 600)),
        height=length,
        width=length,
        dtype=st.sampled_from(DTYPES),
        threads=st.integers(1, 8),
        project=st.booleans(),
    )
    def check(
        batch: int, channels: int, height: int, width: int, dtype: str, threads: int, project: bool
    ) -> None:
        shape = (batch, channels, height, width)
        for backend in BACKENDS:
            for device in ("cpu", "cuda"):
                setting: dict[str, Any] = {
                    "dtype": dtype,
                    "device": device,
                    "threads": threads,
                    "backend": backend,
                    "project": project,
                }
                ran = _compare(in_the_page, layer, shape, **setting)
                compared[backend, device] += ran

    check()
    runs = {("automatic", "cpu"), ("automatic", "cuda"), ("reference", "cpu"), ("sdpa", "cpu")}
    runs |= {("reference", "cuda"), ("sdpa", "cuda"), ("chunked", "cpu")}
    if layer == "fully":
        runs |= {("native", "cpu"), ("triton", "cuda")}
    assert {pair for pair, count in compared.items() if count} == runs
    assert min(compared[pair] for pair in runs) >= 20


def test_the_reason_says_what_stands_against_a_backend(in_the_page: Callable[..., Any]) -> None:
    setting = {"batch": 1, "channels": 8, "height": 600, "width": 4, "dtype": "float32"}
    setting |= {"threads": 1, "project": False}
    for layer, device, backend, said in (
        ("channel", "cpu", "native", "computes axial channel attention, not channel attention"),
        ("fully", "cuda", "native", "runs on cpu, not on cuda"),
        ("fully", "cuda", "triton", "takes up to 512 features, not 600"),
        ("spatial", "cuda", "chunked", "runs on cpu, not on cuda"),
    ):
        found = in_the_page(layer=layer, device=device, backend=backend, **setting)
        assert found == {"reason": f"{backend} {said}"}


def test_a_new_backend_needs_nothing_but_its_declaration(monkeypatch: pytest.MonkeyPatch) -> None:
    racer = pytest.importorskip("py_mini_racer", reason="needs mini-racer: a V8 to run scripts in")
    like = sdpa.BACKEND

    def workspace(a: Any, setting: Any) -> Any:
        found = like.workspace(a, setting)
        return replace(found, inference=found.inference + 1234 * a.query[2])

    halves = {"*": frozenset({torch.bfloat16, torch.float16})}
    toy = replace(like, name="toy", workspace=workspace, dtypes=halves)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, toy))
    monkeypatch.setitem(dispatch._BY_NAME, "toy", toy)
    context = racer.MiniRacer()
    context.eval(explorer.script() + SCRIPT.read_text("utf-8"))

    def ask(**setting: Any) -> Any:
        return json.loads(
            context.eval(f"JSON.stringify(fullattnCosts.cost({json.dumps(setting)}))")
        )

    setting: dict[str, Any] = {"device": "cpu", "threads": 2, "backend": "toy", "project": False}
    for layer in LAYERS:
        assert _compare(ask, layer, (2, 24, 9, 11), dtype="bfloat16", **setting)
        assert not _compare(ask, layer, (2, 24, 9, 11), dtype="float32", **setting)
    found = ask(layer="fully", batch=1, channels=8, height=4, width=4, dtype="float32", **setting)
    assert found == {"reason": "toy takes bfloat16, float16 on cpu, not float32"}
