"""Gradients at scores of any size, and inputs that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fullattn
from fullattn.attention import native
from helpers.cases import FULLY_ATTENTIONAL, SOFTMAX_CASES, Case

NATIVE = pytest.param(
    FULLY_ATTENTIONAL,
    "native",
    id="native",
    marks=pytest.mark.skipif(native._unavailable() is not None, reason="needs the native kernel"),
)
each_case_and_backend = pytest.mark.parametrize(
    ("case", "backend"),
    [
        NATIVE,
        *(
            pytest.param(case, backend, id=f"{case.name}-{backend}")
            for case in SOFTMAX_CASES
            for backend in ("chunked", "sdpa", None)
        ),
    ],
)


def gradient(case: Case, backend: str | None, x: torch.Tensor, dtype: torch.dtype) -> Any:
    layer = case.build(x.shape[1], dtype)
    x = x.to(dtype, copy=True).requires_grad_()
    with fullattn.backend(backend):
        layer(x).mul(
            torch.linspace(-1, 1, x.numel(), dtype=dtype).reshape(x.shape)
        ).sum().backward()
    return x.grad.double()


@each_case_and_backend
def test_gradients_are_as_good_as_the_definitions_at_any_score(
    case: Case, backend: str | None
) -> None:
    @given(
        factor=st.floats(-2, 6).map(lambda n: 10.0**n),
        size=st.tuples(st.integers(2, 12), st.integers(2, 9), st.integers(2, 9)),
        seed=st.integers(0, 2**31),
    )
    def check(factor: float, size: tuple[int, int, int], seed: int) -> None:
        x = torch.randn(1, *size, generator=torch.Generator().manual_seed(seed)) * factor
        exact = gradient(case, "reference", x, torch.float64)
        # float32 rounds the scores themselves, which no backend can mend.
        rounding = (gradient(case, "reference", x, torch.float32) - exact).norm()
        error = (gradient(case, backend, x, torch.float32) - exact).norm()
        assert error <= 1e-3 * exact.norm() + 4 * rounding

    check()


@pytest.mark.parametrize("factor", [10.0, 100.0, 1e3, 3e3, 1e6])
def test_the_gaussian_form_at_the_scores_where_pytorchs_kernel_fails(factor: float) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"mode": "gaussian", "zero_init": False}
    layer = fullattn.SpatialNonLocal(64, **options)
    exact = fullattn.SpatialNonLocal(64, backend="reference", **options).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(1, 64, 16, 16) * factor
    found, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    layer(found).square().sum().backward()
    exact(expected).square().sum().backward()
    error = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
    assert error < 1e-4


@each_case_and_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_result_as_in_the_definition(
    case: Case, backend: str | None, dtype: torch.dtype, bad: float
) -> None:
    layer = case.build(8, dtype).eval()
    x = torch.randn(2, 8, 6, 6).to(dtype)
    x[0, 3, 2, 1] = bad
    with torch.no_grad(), fullattn.backend("reference"):
        expected = layer(x).isfinite()
    with torch.no_grad(), fullattn.backend(backend):
        found = layer(x).isfinite()
    assert torch.equal(found, expected)
