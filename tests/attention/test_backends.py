"""The primitive itself, in groupings that no layer asks for: own keys for every slice, M ≠ N."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fullattn.attention import Backend, ScoreFunction, attend
from fullattn.attention.dispatch import BACKENDS
from fullattn.attention.reference import similarity
from helpers import oracle
from helpers.cases import assert_near

SOFTMAX_BACKENDS = [backend for backend in BACKENDS if ScoreFunction.SOFTMAX in backend.attend]
each_backend = pytest.mark.parametrize("backend", SOFTMAX_BACKENDS, ids=lambda entry: entry.name)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> np.ndarray:
    q, k, v = (x.detach().double().numpy() for x in (query, key, value))
    batch, slices, tokens, _ = q.shape
    out = np.empty((batch, slices, tokens, v.shape[-1]))
    for s in range(slices):
        # A slice axis of 1 is shared by all slices.
        own_key, own_value = k[:, min(s, k.shape[1] - 1)], v[:, min(s, v.shape[1] - 1)]
        weights = oracle.softmax(scale * np.einsum("bnd,bmd->bnm", q[:, s], own_key))
        out[:, s] = np.einsum("bnm,bme->bne", weights, own_value)
    return out


@each_backend
@pytest.mark.parametrize("shared_value", [False, True], ids=["own value", "shared value"])
@pytest.mark.parametrize("shared_key", [False, True], ids=["own key", "shared key"])
@given(
    sizes=st.tuples(*(st.integers(1, 7) for _ in range(6))),
    scale=st.sampled_from([1.0, 0.3, -0.7]),
)
def test_attend_is_the_oracle_with_its_gradients(
    backend: Backend,
    shared_key: bool,
    shared_value: bool,
    sizes: tuple[int, ...],
    scale: float,
) -> None:
    batch, slices, tokens, memory, features, value_features = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    query = draw(batch, slices, tokens, features)
    key = draw(batch, 1 if shared_key else slices, memory, features)
    value = draw(batch, 1 if shared_value else slices, memory, value_features)
    out = attend(query, key, value, scale, backend=backend.name)
    assert_near(out, exact(query, key, value, scale), torch.float64)

    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    actual = torch.autograd.grad(out, [query, key, value], direction)
    definition = similarity(query, key, scale) @ value
    expected = torch.autograd.grad(definition, [query, key, value], direction)
    size = 0.01 * max(gradient.abs().max().item() for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other, torch.float64, size=size)


@each_backend
def test_views_of_one_memory_are_not_taken_for_one_tensor(backend: Backend) -> None:
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for query, key, value in ((x, x, x.mT), (x.mT, x, x), (x, x[:, :1], x.mT)):
        out = attend(query, key, value, backend=backend.name)
        assert_near(out, exact(query, key, value, 1.0), torch.float64)
