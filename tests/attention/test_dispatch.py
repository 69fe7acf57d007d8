"""Which backend runs: the rule, the four ways to override it, and what is said about it."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fullattn
from fullattn import functional
from fullattn.attention import (
    AttentionInputs,
    Backend,
    BackendError,
    ScoreFunction,
    backend_names,
    choose,
    sdpa,
)
from fullattn.attention.backend import FLOATING
from fullattn.attention.dispatch import BACKENDS, explain, fused
from helpers.cases import CASES, FULLY_ATTENTIONAL, SPATIAL, Case
from helpers.processes import run_program

BY_NAME = {backend.name: backend for backend in BACKENDS}
dtypes = st.sampled_from(sorted(FLOATING, key=str))
sizes = st.integers(1, 2**20)


@st.composite
def asked(draw: st.DrawFn) -> AttentionInputs:
    operation = draw(
        st.sampled_from(
            [
                functional.AXIAL_CHANNEL_ATTENTION,
                functional.CHANNEL_ATTENTION,
                functional.POSITION_ATTENTION,
            ]
        )
    )
    return AttentionInputs(
        operation=operation.name,
        sliced=operation.sliced,
        score=draw(st.sampled_from(ScoreFunction)),
        device=draw(st.sampled_from(["cpu", "cuda", "meta", "mps"])),
        dtype=draw(dtypes),
        map_numel=draw(sizes),
        token_numel=draw(sizes),
        features=draw(st.integers(1, 512)),
    )


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_backend_runs_on_this_machine(backend: Backend) -> None:
    # Where a backend cannot, this line of the report says why, and its tests are not there.
    if reason := backend.unavailable():
        pytest.skip(f"{backend.name}: {reason}")
    inputs = (case.inputs(dtype) for case in CASES for dtype in FLOATING)
    assert any(not backend.reasons_against(each) for each in inputs)


@given(inputs=asked())
def test_the_map_is_built_only_where_it_is_smaller_or_nothing_else_can(
    inputs: AttentionInputs,
) -> None:
    chosen = choose(inputs)
    able = [b for b in BACKENDS if not b.builds_map and not b.reasons_against(inputs)]
    smaller = inputs.map_numel < inputs.token_numel
    if (smaller and not inputs.sliced) or not able:
        assert chosen.builds_map
    else:
        assert chosen is next(b for b in fused(inputs) if b in able)


@pytest.mark.parametrize(
    ("layer", "shape", "builds_map"),
    [
        (fullattn.FullyAttentional(16, project=False), (1, 16, 4, 4), False),  # 2048 : 1024
        (fullattn.FullyAttentional(16, project=False), (1, 16, 9, 9), False),  # always fused
        (fullattn.ChannelNonLocal(16), (1, 16, 4, 4), True),  # 256 : 512
        (fullattn.ChannelNonLocal(16), (1, 16, 2, 2), False),  # 256 : 128
        (fullattn.SpatialNonLocal(16), (1, 16, 4, 4), False),  # 256 : 256, not smaller
        (fullattn.SpatialNonLocal(16), (1, 16, 3, 3), True),  # 81 : 144
        (fullattn.SpatialNonLocal(16, subsample=2), (1, 16, 4, 4), True),  # 64 : 160
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else str(value),
)
def test_the_rule_counts_the_map_against_the_tokens(
    layer: torch.nn.Module, shape: tuple[int, ...], builds_map: bool, ran: list[str]
) -> None:
    layer(image(*shape))
    assert {BY_NAME[name].builds_map for name in ran} == {builds_map}


@given(inputs=asked())
def test_explain_agrees_with_choose(inputs: AttentionInputs) -> None:
    rows = explain(inputs)
    assert [backend for backend, _ in rows] == list(BACKENDS)
    running = [backend for backend, sentence in rows if sentence.startswith("runs:")]
    assert running == [choose(inputs)]
    for backend, sentence in rows:
        assert sentence.startswith("cannot run: ") == bool(backend.reasons_against(inputs))
        for reason in backend.reasons_against(inputs):
            assert reason in sentence


@given(inputs=asked(), name=st.sampled_from(backend_names()))
def test_explain_agrees_with_a_forced_choice(inputs: AttentionInputs, name: str) -> None:
    running = [backend.name for backend, text in explain(inputs, name) if text.startswith("runs:")]
    if BY_NAME[name].reasons_against(inputs):
        assert running == []
        with pytest.raises(BackendError):
            choose(inputs, name)
    else:
        assert running == [name]
        assert choose(inputs, name).name == name


def test_forcing_a_backend_that_cannot_run_is_one_error_with_all_reasons() -> None:
    layer = fullattn.SpatialNonLocal(4, mode="concatenation", backend="sdpa")
    with pytest.raises(BackendError) as caught:
        layer(image(1, 4, 5, 6))
    message = str(caught.value)
    inputs = SPATIAL.inputs(torch.float32)._replace(score=ScoreFunction.CONCATENATION)
    assert message.startswith("backend 'sdpa' cannot run concatenation attention")
    for backend in BACKENDS:
        reasons = backend.reasons_against(inputs) or ["can run it"]
        assert backend is sdpa.BACKEND or f"{backend.name}: {', '.join(reasons)}" in message
        assert all(reason in message for reason in reasons)


def test_an_unknown_backend_is_a_value_error() -> None:
    expected = f"backend must be one of {', '.join(backend_names())}, got 'fastest'"
    with pytest.raises(ValueError, match=expected), fullattn.backend("fastest"):
        pytest.fail("the block ran")


def test_the_context_wins_over_the_layer_and_the_layer_over_the_rule(ran: list[str]) -> None:
    layer = fullattn.FullyAttentional(8, backend="chunked")
    x = image(1, 8, 3, 3)
    layer(x)
    with fullattn.backend("reference"):
        layer(x)
    with fullattn.backend(None):
        layer(x)
    assert list(dict.fromkeys(ran)) == ["chunked", "reference"]
    assert ran[-1] == "chunked"


def test_contexts_nest_and_end_with_an_exception() -> None:
    inputs = FULLY_ATTENTIONAL.inputs(torch.float32)
    automatic = choose(inputs).name
    with fullattn.backend("sdpa"):
        with fullattn.backend("reference"):
            assert choose(inputs).name == "reference"
        assert choose(inputs).name == "sdpa"
        with pytest.raises(KeyError), fullattn.backend("chunked"):
            raise KeyError
        assert choose(inputs).name == "sdpa"
    assert choose(inputs).name == automatic


def test_the_backward_pass_runs_on_the_backend_of_its_forward() -> None:
    layer = fullattn.FullyAttentional(8, project=False, gamma_init=1.0)
    x = image(1, 8, 3, 3).requires_grad_()
    with fullattn.backend("sdpa"):
        inside = layer(x)
    (expected,) = torch.autograd.grad(inside, x, torch.ones_like(x), retain_graph=True)
    with fullattn.backend("chunked"):
        (actual,) = torch.autograd.grad(inside, x, torch.ones_like(x))
    assert torch.equal(actual, expected)


PRECEDENCE = """
import torch, fullattn
from fullattn import costs
from fullattn.attention import choose
layer = fullattn.FullyAttentional(8, device="meta")
inputs = costs.inputs_of(layer, (1, 8, 3, 3), torch.float32, "cpu")
def names():
    with fullattn.backend("chunked"):
        inside = choose(inputs, "reference").name
    return choose(inputs).name, choose(inputs, "reference").name, inside
try:
    print(*names())
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("sdpa", "sdpa reference chunked"),
        ("fastest", f"FULLATTN_BACKEND must be one of {', '.join(backend_names())}, got 'fastest'"),
    ],
)
def test_the_environment_is_looked_at_after_context_and_layer(value: str, printed: str) -> None:
    done = run_program(PRECEDENCE, env={**os.environ, "FULLATTN_BACKEND": value})
    assert done.stdout.strip() == printed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_inputs_count_what_the_layer_has(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AttentionInputs] = []

    def noting(inputs: AttentionInputs, requested: str | None = None) -> Backend:
        seen.append(inputs)
        return choose(inputs, requested)

    monkeypatch.setattr(fullattn.attention, "choose", noting)
    layer, x = case.build(6, torch.float32), image(3, 6, 4, 10)
    layer(x)
    maps = layer.similarity(x)
    numbers = sum(one[0].numel() for one in ([maps] if isinstance(maps, Tensor) else maps))
    assert [inputs.score for inputs in seen] == [case.score]
    assert seen[0].map_numel == numbers
    assert (seen[0].device, seen[0].dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize(("batch", "slices"), [(7, 3), (3, 7), (1, 9), (9, 1)])
def test_sdpa_in_parts_is_sdpa(batch: int, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # CUDA's grid is too small for some shapes; the cut itself is the same on every device.
    query, key, value = (image(batch, slices, 4, 8) for _ in range(3))
    monkeypatch.setattr(sdpa, "_CUDA_GRID", 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5)
    torch.testing.assert_close(sdpa._in_parts(query, key, value, 0.5), expected)
