"""The C kernel: right for every kind of processor that this one can play, absent with a reason."""

import copy
import ctypes
import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fullattn
from fullattn import costs
from fullattn.attention import native
from fullattn.functional import columns_and_rows

MISSING = native._unavailable()
needs_kernel = pytest.mark.skipif(MISSING is not None, reason=f"native kernel: {MISSING}")

# Processors with vectors of 16, 8 and 4 numbers; this one runs those that its own flags cover.
TARGETS = {
    "native": "",
    "x86-64-v4": "avx512vl",
    "x86-64-v3": "avx2",
    "x86-64-v2": "sse4_2",
}


def runs_here(target):
    if target == "native":
        return True
    return platform.machine() == "x86_64" and TARGETS[target] in native._processor().split()


@pytest.fixture(scope="module", params=TARGETS)
def kernel(request):
    if not runs_here(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    built = ctypes.CDLL(str(native._build(request.param)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_kernel", lambda: built)
        yield request.param


def relative_error(got, expected):
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def lay_out(x, layout):
    match layout:
        case "contiguous":
            return x
        case "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        case "transposed":
            return x.mT.contiguous().mT
        case "every second":
            wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
            wide[..., ::2] = x
            return wide[..., ::2]
        case "shifted":  # not aligned to a vector
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    raise AssertionError(layout)


LAYOUTS = ["contiguous", "channels_last", "transposed", "every second", "shifted"]
# Around the widths of the register tile, the vectors and the blocks of keys and queries.
CHANNELS = st.sampled_from([1, 2, 5, 12, 13, 16, 31, 32, 33, 64, 65, 97, 128, 129, 150])
SIDES = st.sampled_from([1, 2, 3, 7, 11, 12, 13, 16, 17, 24, 33, 40])


@needs_kernel
@given(
    batch=st.integers(1, 3),
    channels=CHANNELS,
    height=SIDES,
    width=SIDES,
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([1.0, 0.3, -0.7]),
    seed=st.integers(0, 2**16),
)
def test_kernel_and_its_gradients_equal_the_definition_in_float64(
    kernel, batch, channels, height, width, layout, grad_layout, scale, seed
):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, height, width)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    keys = [torch.randn(batch, channels, n, generator=generator) for n in (height, width)]
    exact = [t.double().requires_grad_() for t in (x, *keys)]
    expected = columns_and_rows(*exact, scale)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    expected = expected.detach()

    x, grad = lay_out(x, layout), lay_out(grad, grad_layout)
    got = native._forward(x, *keys, scale)
    got_grads = native._backward(grad, x, *keys, scale)
    assert relative_error(got, expected) < 1e-5
    # The gradient of a score is a difference of large numbers where the softmax is sharp, and of
    # one token it is 0: so the yardstick is the largest gradient.
    largest = max(float(g.abs().max()) for g in expected_grads)
    for name, one, other in zip(
        ("x", "column_key", "row_key"), got_grads, expected_grads, strict=True
    ):
        assert float((one - other).abs().max()) < 2e-5 * largest, name


@needs_kernel
def test_same_call_gives_the_same_bits():
    x, grad = torch.randn(2, 2, 96, 20, 24).unbind()
    keys = torch.randn(2, 96, 20), torch.randn(2, 96, 24)
    first, second = (
        (native._forward(x, *keys, 1.0), *native._backward(grad, x, *keys, 1.0)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
def test_any_number_of_threads_gives_the_same_numbers(threads, monkeypatch):
    x, grad = torch.randn(2, 2, 64, 9, 50).unbind()
    keys = torch.randn(2, 64, 9), torch.randn(2, 64, 50)
    expected = (native._forward(x, *keys, 1.0), *native._backward(grad, x, *keys, 1.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(native, "_WORTH_THREADS", 0)
    got = (native._forward(x, *keys, 1.0), *native._backward(grad, x, *keys, 1.0))
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other.double()) < 1e-5


@needs_kernel
def test_large_scores_do_not_overflow_and_not_a_number_stays_in_its_image():
    x = torch.randn(3, 40, 9, 10) * 1e4
    keys = [torch.randn(3, 40, n) * 1e4 for n in (9, 10)]
    assert (
        relative_error(
            native._forward(x, *keys, 1.0), columns_and_rows(*(t.double() for t in (x, *keys)), 1.0)
        )
        < 1e-3
    )
    x[1, 3, 4, 5] = float("nan")
    y = native._forward(x, *keys, 1.0)
    assert y[1].isnan().any()
    assert y[[0, 2]].isfinite().all()
    grads = native._backward(torch.ones_like(x), x, *keys, 1.0)
    assert all(g[[0, 2]].isfinite().all() for g in grads)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


WHY = """
import torch, fullattn
from fullattn.attention import dispatch
from fullattn import costs
x = torch.randn(1, 16, 4, 5)
meta = fullattn.FullyAttentional(16, device="meta")
inputs = costs.inputs_of(meta, tuple(x.shape), x.dtype, "cpu")
print(dispatch.choose(inputs).name)
print(dict((b.name, why) for b, why in dispatch.explain(inputs))["native"])
layer = fullattn.FullyAttentional(16, project=False, backend="native")
try:
    layer(x)
except fullattn.BackendError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FULLATTN_NATIVE": "0"}, "switched off by FULLATTN_NATIVE=0"),
        ({"CC": "no-such-compiler"}, "needs a C compiler: found none of no-such-compiler"),
        ({"CC": "false"}, "the C compiler failed"),
        ({"FULLATTN_CACHE": "/dev/null/cache"}, "its cache folder cannot be written"),
    ],
)
def test_where_the_kernel_cannot_be_had_the_next_backend_runs_and_the_reason_is_given(
    environment, reason, tmp_path
):
    done = run(WHY, **{"FULLATTN_CACHE": str(tmp_path), **environment})
    assert done.returncode == 0, done.stderr
    chosen, why, error = done.stdout.splitlines()
    assert chosen == "chunked"
    assert reason in why
    assert reason in error
    assert not list(tmp_path.iterdir())


@needs_kernel
def test_processes_that_build_at_once_share_one_result(tmp_path):
    code = "from fullattn.attention import native; assert native._unavailable() is None"
    environment = {**os.environ, "FULLATTN_CACHE": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    (built,) = tmp_path.iterdir()
    assert built.suffix == ".so"


@needs_kernel
def test_without_memory_the_error_says_so(monkeypatch):
    class Exhausted:
        @staticmethod
        def fullattn_forward(*arguments):
            return 1

    monkeypatch.setattr(native, "_kernel", Exhausted)
    with pytest.raises(MemoryError, match=r"out of memory at shape \(1, 4, 3, 2\)"):
        native._forward(torch.randn(1, 4, 3, 2), torch.randn(1, 4, 3), torch.randn(1, 4, 2), 1.0)


@needs_kernel
def test_float64_is_left_to_another_backend():
    layer = fullattn.FullyAttentional(4, device="meta")
    inputs = costs.inputs_of(layer, (1, 4, 3, 3), torch.float64, "cpu")
    (reason,) = native.BACKEND.reasons_against(inputs)
    assert reason == "takes bfloat16, float16, float32 on cpu, not float64"
    with fullattn.backend("native"), pytest.raises(fullattn.BackendError, match="not float64"):
        fullattn.FullyAttentional(4, dtype=torch.float64)(torch.zeros(1, 4, 3, 3).double())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_inference_the_residual_is_added_in_the_kernel(dtype, layout, ran, monkeypatch):
    added = []
    monkeypatch.setattr(
        fullattn.attention, "scaled_residual", lambda *given: added.append(given) or given[2]
    )
    torch.manual_seed(0)
    layer = fullattn.FullyAttentional(20, project=False, gamma_init=0.7, backend="native")
    layer = layer.to(dtype)
    x = lay_out(torch.randn(3, 20, 7, 18).to(dtype), layout)
    before = x.clone()
    with torch.no_grad():
        y = layer(x)
    assert (ran, added) == (["native"], [])
    assert torch.equal(x, before)
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    monkeypatch.undo()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert relative_error(y, exact(x.double()).detach()) < tolerance
    layer.gamma.data.zero_()
    with torch.no_grad():
        assert torch.equal(layer(x), x)


@needs_kernel
def test_with_a_gradient_the_residual_is_added_outside_and_gamma_has_its_own():
    layer = fullattn.FullyAttentional(6, project=False, gamma_init=0.7, backend="native")
    x = torch.randn(2, 6, 5, 4)
    layer(x).square().sum().backward()
    found = layer.gamma.grad.clone()
    layer.zero_grad()
    layer.backend = "reference"
    layer(x).square().sum().backward()
    assert relative_error(found, layer.gamma.grad.double()) < 1e-4


@needs_kernel
def test_autocast_and_a_wider_gamma_keep_the_wider_dtype():
    layer = fullattn.FullyAttentional(6, project=False, gamma_init=0.7, backend="native")
    x = torch.randn(2, 6, 5, 4)
    for image in (x, x.bfloat16()):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = layer(image)
        assert y.dtype == torch.float32
        assert relative_error(y, layer(x).double().detach()) < 5e-2
