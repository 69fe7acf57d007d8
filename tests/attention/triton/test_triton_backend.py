"""Where the Triton backend does not run: the reason in a sentence, and the next backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import fullattn
from fullattn import costs
from fullattn._versions import VERSION
from fullattn.attention import AttentionInputs, ScoreFunction, triton
from fullattn.attention.dispatch import choose, explain

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, the backend runs anywhere"
)

ON_A_GPU = costs.inputs_of(
    fullattn.FullyAttentional(512, device="meta"), (1, 512, 96, 96), torch.bfloat16, "cuda"
)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    triton._missing.cache_clear()
    yield
    triton._missing.cache_clear()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has Triton and a Hopper card, as far as anybody asks."""
    monkeypatch.setattr(triton, "_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return monkeypatch


def assert_passed_over(inputs: AttentionInputs, reason: str) -> None:
    assert choose(inputs).name == "sdpa"
    assert reason in " ".join(triton.BACKEND.reasons_against(inputs))
    with fullattn.backend("triton"), pytest.raises(fullattn.BackendError, match=reason):
        choose(inputs)
    (sentence,) = (said for entry, said in explain(inputs) if entry is triton.BACKEND)
    assert sentence.startswith("cannot run: ")
    assert reason in sentence


def test_first_on_a_gpu(card: pytest.MonkeyPatch) -> None:
    assert choose(ON_A_GPU) is triton.BACKEND
    for dtype in (torch.float16, torch.float32):
        assert choose(ON_A_GPU._replace(dtype=dtype)) is triton.BACKEND
    assert {e.name: s for e, s in explain(ON_A_GPU)}["triton"].startswith("runs: ")


def test_other_attention_is_not_its_own(card: pytest.MonkeyPatch) -> None:
    for score in set(ScoreFunction) - {ScoreFunction.SOFTMAX}:
        assert choose(ON_A_GPU._replace(score=score)) is not triton.BACKEND
    assert choose(ON_A_GPU._replace(operation="channel attention")) is not triton.BACKEND


def test_a_dtype_that_the_kernels_do_not_take(card: pytest.MonkeyPatch) -> None:
    inputs = ON_A_GPU._replace(dtype=torch.float64)
    assert choose(inputs).name == "reference"  # which is all that there is on CUDA
    with fullattn.backend("triton"), pytest.raises(fullattn.BackendError, match="not float64"):
        choose(inputs)


def test_a_slice_that_is_too_long(card: pytest.MonkeyPatch) -> None:
    assert choose(ON_A_GPU._replace(features=512)) is triton.BACKEND
    inputs = ON_A_GPU._replace(features=513)
    assert_passed_over(inputs, "takes up to 512 features, not 513")


def test_a_card_that_is_too_old(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert_passed_over(ON_A_GPU, "needs compute capability 8.0 or newer, this card has 7.5")


def test_another_maker(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.version, "hip", "6.4")
    assert_passed_over(ON_A_GPU, "not for ROCm")


def test_no_card(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.cuda, "is_available", lambda: False)
    assert_passed_over(ON_A_GPU, "there is no CUDA device")


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert_passed_over(ON_A_GPU, "Triton is not installed")


def test_a_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
    assert_passed_over(ON_A_GPU, "needs Triton 3.6 or newer, this is 3.5.1")


def test_a_triton_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", None)
    assert_passed_over(ON_A_GPU, "Triton does not import")


def test_asked_for_by_name_on_a_cpu() -> None:
    layer = fullattn.FullyAttentional(4, backend="triton")
    with pytest.raises(fullattn.BackendError, match=r"'triton' cannot run .* on cuda, not on cpu"):
        layer(torch.randn(1, 4, 3, 5))


def test_means_are_left_to_pytorch_where_the_kernels_do_not_run() -> None:
    x = torch.randn(1, 4, 3, 5).contiguous(memory_format=torch.channels_last)
    assert triton.axial_means(x) is None


@pytest.fixture
def _switches() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_switches")
def test_tf32_only_where_pytorch_allows_it() -> None:
    assert triton._precision() == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    assert triton._precision() == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    assert triton._precision() == "ieee"
    if VERSION < (2, 9):
        return  # the other setting came with 2.9
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert triton._precision() == "tf32"


def test_the_operator_itself_computes_anywhere_and_says_how() -> None:
    # As in an exported program that was made on a GPU and is loaded where there is none.
    torch.manual_seed(0)
    x, column_key, row_key = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    inputs = [each.requires_grad_() for each in (x, column_key, row_key)]
    with pytest.warns(RuntimeWarning, match=r"shape \(2, 3, 4, 5\) .*not on cpu"):
        y = triton.axial_channel_attention(*inputs)
    exact = fullattn.functional.fully_attentional(*inputs, backend="reference")
    torch.testing.assert_close(y, exact)
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), inputs),
        torch.autograd.grad(exact.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    triton._failed.clear()


def test_importing_the_package_does_not_import_triton() -> None:
    program = "import sys, fullattn; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
