"""The C kernel: right for every kind of processor that this one can play, absent with a reason."""

import copy
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fullattn
from fullattn import costs
from fullattn.attention import dispatch, native
from fullattn.functional import columns_and_rows
from helpers.processes import run_program

load = native._kernel.__wrapped__
MISSING = native._unavailable()
needs_kernel = pytest.mark.skipif(MISSING is not None, reason=f"native kernel: {MISSING}")


# Processors with vectors of 16, 8 and 4 numbers; this one runs those that its own flags cover.
@pytest.fixture(scope="module", params=["native", *native._LEVELS])
def kernel(request):
    if request.param not in ("native", *native._levels()):
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
    strict = "import warnings\nwarnings.simplefilter('error')\n"
    return run_program(strict + code, env={**os.environ, **environment})


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
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "another library", "a folder"])
def test_a_damaged_or_foreign_file_in_the_cache_is_compiled_again(damage, tmp_path, monkeypatch):
    compiled = native._build()
    monkeypatch.setattr(native, "_run", lambda command: shutil.copy(compiled, command[-1]))
    monkeypatch.setenv("FULLATTN_CACHE", str(tmp_path))
    built = native._build()
    content = built.read_bytes()
    half = len(content) // 2
    built.unlink()
    match damage:
        case "cut":
            built.write_bytes(content[:half])
        case "changed":
            built.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
        case "empty":
            built.touch()
        case "another library":
            other = next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps*"))
            built.write_bytes(other.read_bytes())
        case "a folder":
            built.mkdir()
    if damage == "a folder":
        with (
            pytest.warns(UserWarning, match="not what fullattn wrote"),
            pytest.raises(native._BuildError, match="its cache folder cannot be written"),
        ):
            native._build()
        return
    with pytest.warns(
        UserWarning, match=rf"fullattn: {built} is damaged, .*: it is compiled again"
    ):
        assert native._build() == built
    ctypes.CDLL(str(built)).fullattn_forward  # noqa: B018 - it has the function
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native._build()


V2, V3, V4 = (set(native._LEVELS[level].split()) for level in reversed(native._LEVELS))


@pytest.mark.parametrize(
    ("machine", "able", "expected"),
    [
        ("x86_64", V2 | V3 | V4, ["x86-64-v4", "x86-64-v3", "x86-64-v2"]),
        ("x86_64", V2 | V3 | V4 - {"avx512vl"}, ["x86-64-v3", "x86-64-v2"]),
        ("x86_64", V2 | V3 | {"avx512f", "sse4a"}, ["x86-64-v3", "x86-64-v2"]),
        ("x86_64", V2 | V3 - {"fma"}, ["x86-64-v2"]),
        ("x86_64", V3 | V4, []),
        ("x86_64", set(), []),
        ("aarch64", {"asimd"}, ["aarch64"]),
        ("riscv64", set(), []),
    ],
)
def test_a_wheel_s_kernels_are_taken_by_what_the_processor_can_do(
    machine, able, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(native, "_processor", lambda: frozenset(able))
    monkeypatch.setattr(native, "_SOURCE", tmp_path / "native.c")
    assert native._ready() == []
    for name in (*native._LEVELS, "aarch64"):
        (tmp_path / f"native-{name}.so").touch()
    assert native._ready() == [tmp_path / f"native-{name}.so" for name in expected]


@needs_kernel
def test_a_wheel_s_kernel_needs_no_compiler_and_one_that_cannot_be_loaded_is_passed_over(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(native, "_SOURCE", tmp_path / "native.c")
    shutil.copy(Path(native.__file__).with_suffix(".c"), native._SOURCE)
    first, second = tmp_path / "native-first.so", tmp_path / "native-second.so"
    shutil.copy(native._build(), second)
    first.write_text("not a library")
    monkeypatch.setattr(native, "_levels", lambda: ["first", "second"])
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load()._name == str(second)
    second.unlink()
    assert load() == "needs a C compiler: found none of no-such-compiler"


@pytest.mark.parametrize(("name", "system"), [("darwin", "Darwin"), ("win32", "Windows")])
def test_elsewhere_than_on_linux_the_next_backend_runs(name, system):
    code = (
        f"import platform, sys, torch\nimport fullattn.attention.native\nsys.platform = {name!r}\n"
    )
    code += f"platform.system = lambda: {system!r}\n" + WHY
    done = run(code)
    assert done.returncode == 0, done.stderr
    chosen, why, error = done.stdout.splitlines()
    assert chosen == "chunked"
    assert f"needs Linux, not {system}" in why
    assert f"needs Linux, not {system}" in error


def test_without_a_home_the_next_backend_runs(monkeypatch):
    for name in ("FULLATTN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native, "_ready", list)
    monkeypatch.setattr(Path, "home", unknown)
    reason = load()
    assert reason == "no cache folder: neither FULLATTN_CACHE nor HOME is set" or MISSING


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (fullattn.FullyAttentional, "sdpa"),
        (fullattn.ChannelNonLocal, "reference"),
        (fullattn.SpatialNonLocal, "sdpa"),
    ],
)
def test_on_mps_pytorch_s_own_operators_run_and_the_kernels_say_why_not(layer, expected):
    inputs = costs.inputs_of(layer(16, device="meta"), (1, 16, 20, 21), torch.float32, "mps")
    assert dispatch.choose(inputs).name == expected
    why = {backend.name: reason for backend, reason in dispatch.explain(inputs)}
    for name in ("native", "triton", "chunked"):
        if name in why:
            assert "not on mps" in why[name]


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
