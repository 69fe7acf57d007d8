"""The Triton kernels against float64: on a GPU where there is one, otherwise interpreted.

Interpreted they run on the CPU, a program after the other, when TRITON_INTERPRET=1 is set before
Triton is imported: `make test` runs this file so. The interpreter is wrong in bfloat16.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import fullattn
import oracle
from cases import arrays, assert_near, peak_bytes
from fullattn import costs
from fullattn.attention import triton
from fullattn.functional import columns_and_rows, fully_attentional, row_similarity
from fullattn.reshape import COLUMNS, ROWS, Cut

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip(
        "needs a GPU, or TRITON_INTERPRET=1 as `make test` sets it", allow_module_level=True
    )
if (reason := triton.BACKEND.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fullattn.attention.triton import launch, tuning  # noqa: E402
from fullattn.attention.triton.configurations import CONFIGURATIONS  # noqa: E402

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _sliced(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    base = x.new_full((batch, channels + 1, 2 * height, 3 * width + 1), float("nan"))
    view = base[:, 1:, ::2, 1::3]
    return view.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": _transposed,
    "sliced": _sliced,
}


@dataclass(frozen=True)
class Drawn:
    """One call of the operator; numbers from the seed."""

    shape: tuple[int, int, int, int]
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    scale: float = 1.0
    gamma: float | None = 0.7
    window: int = launch.WINDOW
    seed: int = 0

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor | None], Tensor]:
        """x, column_key, row_key, gamma; and a gradient of the result."""
        batch, channels, height, width = self.shape
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
            return numbers.to(DEVICE, dtype)

        x = LAYOUTS[self.layout](normal(*self.shape))
        # As the layer's Linear leaves them: the channels are neighbours.
        column_key, row_key = normal(batch, height, channels).mT, normal(batch, width, channels).mT
        gamma = None if self.gamma is None else torch.full((1,), self.gamma).to(x)
        return [x, column_key, row_key, gamma], LAYOUTS[self.grad_layout](normal(*self.shape))


@st.composite
def calls(draw: st.DrawFn) -> Drawn:
    channels, height, width = (
        draw(st.sampled_from(sizes)) for sizes in ((1, 2, 16, 17, 33), (1, 2, 3, 5), (1, 2, 7, 16))
    )
    if draw(st.booleans()):
        height, width = width, height
    return Drawn(
        shape=(draw(st.sampled_from((1, 2))), channels, height, width),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        grad_layout=draw(st.sampled_from(sorted(LAYOUTS))),
        scale=draw(st.sampled_from((1.0, -0.5, 0.1))),
        gamma=draw(st.sampled_from((None, 0.7, 0.0))),
        window=draw(st.sampled_from((1, 1000, 5000, launch.WINDOW))),
        seed=draw(st.integers(0, 2**31)),
    )


@contextlib.contextmanager
def window_of(size: int) -> Iterator[None]:
    previous, launch.WINDOW = launch.WINDOW, size
    try:
        yield
    finally:
        launch.WINDOW = previous


@pytest.fixture(autouse=True)
def _unwritten_is_nan() -> Iterator[None]:
    # What a kernel does not write stays NaN. Deterministic mode also keeps the tuner out.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _nothing_has_failed() -> Iterator[None]:
    triton._failed.clear()
    yield
    triton._failed.clear()


def results(call: Drawn, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The result and the gradient of every input that there is, by the kernels."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    x, column_key, row_key, gamma = inputs
    with window_of(call.window):
        y = triton.axial_channel_attention(x, column_key, row_key, call.scale, gamma)
        given = [each for each in inputs if each is not None]
        return [y, *torch.autograd.grad(y, given, grad.to(y.dtype))]


def expected(call: Drawn, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The same in float64 by the reference, after the forward was compared with the oracle."""
    given = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    x, column_key, row_key, gamma = given
    y = columns_and_rows(x, column_key, row_key, call.scale)
    by_sums = oracle.columns_and_rows_attended(*arrays(x, column_key, row_key), call.scale)
    assert_near(y, by_sums, torch.float64)
    if gamma is not None:
        y = gamma * y + x
    given = [each for each in given if each is not None]
    return [y, *torch.autograd.grad(y, given, grad.double())]


def assert_right(call: Drawn, dtype: torch.dtype) -> None:
    inputs, grad = call.tensors(dtype)
    copies = [None if x is None else x.clone() for x in inputs]
    actual, exact = results(call, inputs, grad), expected(call, inputs, grad)
    # A gradient that cancels to nothing is off by the error of what cancels.
    size = 0.01 * max(each.abs().max().item() for each in exact)
    names = ("result", "x", "column_key", "row_key", "gamma")
    for name, one, other in zip(names, actual, exact, strict=False):
        assert_near(one, other, dtype, size=size, what=name)
    for x, copy in zip(inputs, copies, strict=True):
        assert x is None or torch.equal(x, copy), "an input was modified"
    assert not triton._failed


@each_dtype
@given(call=calls())
def test_result_and_every_gradient_are_those_of_float64(dtype: torch.dtype, call: Drawn) -> None:
    assert_right(call, dtype)


def only(features: int) -> Callable[[launch.Launch], None]:
    """Runs the launches of one branch; the other's are taken to find nothing."""

    def run(each: launch.Launch) -> None:
        if each.arguments["D"] == features:
            tuning.run(each)
        elif each.kernel == "backward_keys":
            each.arguments["grad_key"].zero_()
        else:
            each.arguments["out"].zero_()
            each.arguments.get("delta", each.arguments["out"]).zero_()

    return run


def assert_rows_right(channels: int, width: int, dtype: torch.dtype) -> None:
    """As `assert_right` for the rows of one row: its columns are many, and of one number each."""
    call = Drawn((1, channels, 1, width), scale=0.1, gamma=None)
    (x, column_key, row_key, gamma), grad = call.tensors(dtype)
    run = only(-(-width // 16) * 16)
    y, *lse = launch.forward(x, column_key, row_key, gamma, call.scale, "ieee", run)
    found = launch.backward(grad, x, column_key, row_key, gamma, *lse, call.scale, "ieee", run)
    doubled = x.double().requires_grad_()
    key = row_key.double().requires_grad_()
    exact = torch.einsum("bhij, bjhw -> bihw", row_similarity(doubled, key, call.scale), doubled)
    grad_rows, grad_key = torch.autograd.grad(exact, [doubled, key], grad.double())
    assert_near(y, exact, dtype)
    assert_near(found[0], grad_rows, dtype, what="x")
    assert_near(found[2], grad_key, dtype, what="row_key")


@each_dtype
@pytest.mark.parametrize("width", [48, 97, 144, 208, 240, 300, 500, 512])
def test_long_slices(width: int, dtype: torch.dtype) -> None:
    assert_rows_right(20, width, dtype)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # float32 for those that are small enough for it on a GPU.
    dtype = torch.float16 if CONFIGURATIONS[name].own > 64 else torch.float32
    monkeypatch.setattr(tuning, "_allowed", lambda *_: [CONFIGURATIONS[name]])
    # Several blocks of tokens with a rest, three pieces of features (112 = 64 + 32 + 16).
    assert_rows_right(150 if CONFIGURATIONS[name].own > 16 else 37, 99, dtype)


@each_dtype
def test_many_channels(dtype: torch.dtype) -> None:
    assert_right(Drawn((1, 200, 2, 1)), dtype)
    assert_right(Drawn((1, 128, 1, 2), layout="channels_last", grad_layout="channels_last"), dtype)


@each_dtype
def test_scores_beyond_the_largest_float16(dtype: torch.dtype) -> None:
    inputs, _ = Drawn((1, 4, 5, 6), gamma=None).tensors(torch.float64)
    x, column_key, row_key, _ = (
        None if each is None else (each * 200).to(dtype) for each in inputs
    )
    scores = torch.einsum("bihw,bjh->bwij", x.double(), column_key.double())
    assert scores.abs().max() > 65504
    y = triton.axial_channel_attention(x, column_key, row_key)
    exact = columns_and_rows(x.double(), column_key.double(), row_key.double(), 1.0)
    assert_near(y, exact, dtype)


def test_an_expanded_gradient() -> None:
    call = Drawn((2, 17, 4, 16))
    inputs, grad = call.tensors(torch.float32)
    expanded = grad[:1, :1, :1, :1].expand(grad.shape)
    for one, other in zip(
        results(call, inputs, expanded), expected(call, inputs, expanded), strict=True
    ):
        assert_near(one, other, torch.float32)


def test_no_gradient_for_what_needs_none() -> None:
    (x, column_key, row_key, gamma), grad = Drawn((1, 16, 3, 4)).tensors(torch.float32)
    x.requires_grad_()
    y = triton.axial_channel_attention(x, column_key, row_key, 1.0, gamma)
    y.backward(grad)
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 8, 0, 4), (2, 8, 3, 0)])
def test_an_empty_map(shape: tuple[int, int, int, int]) -> None:
    call = Drawn(shape)
    inputs, grad = call.tensors(torch.float32)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results(call, inputs, grad))


@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.float64])
def test_result_has_the_wider_dtype_of_x_and_gamma(gamma_dtype: torch.dtype) -> None:
    # What autocast leaves of x with a parameter that stays float32.
    call = Drawn((2, 17, 3, 5))
    inputs, grad = call.tensors(torch.float16)
    assert inputs[3] is not None
    inputs[3] = inputs[3].to(gamma_dtype)
    actual = results(call, inputs, grad)
    assert [each.dtype for each in actual] == [gamma_dtype, *[torch.float16] * 3, gamma_dtype]
    for one, other in zip(actual, expected(call, inputs, grad), strict=True):
        assert_near(one, other, torch.float16)


def test_images_do_not_influence_each_other() -> None:
    call = Drawn((3, 17, 4, 5), window=3000)
    inputs, grad = call.tensors(torch.float32)
    x, column_key, row_key, gamma = inputs
    together = results(call, inputs, grad)
    for image in range(3):
        part = slice(image, image + 1)
        alone = results(call, [x[part], column_key[part], row_key[part], gamma], grad[part])
        for one, other in zip(together[:4], alone[:4], strict=True):
            assert_near(one[part], other, torch.float32)


def test_two_runs_are_bit_equal() -> None:
    call = Drawn((2, 20, 3, 18), window=5000)
    inputs, grad = call.tensors(torch.float32)
    for one, other in zip(results(call, inputs, grad), results(call, inputs, grad), strict=True):
        assert torch.equal(one, other)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", [COLUMNS, ROWS], ids=lambda cut: cut.name)
def test_windows_filled_and_emptied_by_a_kernel(
    cut: Cut,
    layout: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "COPY_BY_KERNEL", {DEVICE})
    (x, *_), _ = Drawn((2, 3, 5, 70), layout=layout).tensors(dtype)
    window = torch.empty((*cut(x).shape[:-1], 80), device=DEVICE, dtype=dtype)
    features = cut(x).shape[-1]
    launch._copy(cut(x), window[..., :features], tuning.run)
    assert torch.equal(window[..., :features], cut(x))
    assert window[..., features:].isnan().all()  # of which nothing was said
    back = torch.empty_like(x)
    launch._copy(window[..., :features], cut(back), tuning.run)
    assert torch.equal(back, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_with_slices_read_in_place(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "IN_PLACE", True)
    assert_right(Drawn((2, 17, 3, 5), layout=layout, grad_layout="transposed"), torch.float32)


def test_every_gradient_with_windows_that_a_kernel_fills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COPY_BY_KERNEL", {DEVICE})
    assert_right(Drawn((2, 17, 3, 5), grad_layout="sliced", window=2000), torch.float32)


# Part of PyTorch.


def test_operator_checks() -> None:
    inputs, grad = Drawn((2, 3, 2, 3)).tensors(torch.float32)
    differentiable = tuple(None if x is None else x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.fullattn.attend_triton.default, (*differentiable, 1.0))
    without_gamma = (*(x for x in inputs[:3]), None, -0.5)
    torch.library.opcheck(torch.ops.fullattn.attend_triton.default, without_gamma)
    x, column_key, row_key, gamma = (None if x is None else x.detach() for x in inputs)
    lse = torch.ops.fullattn.attend_triton(x, column_key, row_key, gamma, 1.0)[1:]
    torch.library.opcheck(
        torch.ops.fullattn.attend_triton_backward.default,
        (grad, x, column_key, row_key, gamma, *lse, 1.0),
    )


def test_autocast_casts_before_the_operator() -> None:
    (x, column_key, row_key, _), _ = Drawn((1, 5, 3, 4)).tensors(torch.float32)
    with torch.autocast(DEVICE, torch.float16):
        y = fully_attentional(x, column_key, row_key, backend="triton")
    assert y.dtype == torch.float16
    assert_near(y, fully_attentional(x, column_key, row_key, backend="reference"), torch.float16)


@pytest.mark.parametrize("shape", [(2, 32, 12, 16), (1, 40, 9, 13)])
def test_memory_is_that_of_the_formula(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not INTERPRETED:
        pytest.skip("benchmarks/gpu.py asks the GPU's allocator")
    monkeypatch.setattr(launch, "WINDOW", 40_000)
    # The interpreter holds the arguments of its last launch; what kernels write is of no interest.
    monkeypatch.setattr(tuning, "run", lambda each: None)
    layer = layer_of(shape[1])
    cost = costs.cost(layer, shape, backend="triton", device=DEVICE)
    inference, training = peak_bytes(layer, shape, "triton", torch.float32)
    assert cost.inference_bytes == pytest.approx(inference, rel=0.1, abs=5000)
    assert cost.training_bytes == pytest.approx(training, rel=0.1, abs=5000)


def test_flops_are_counted() -> None:
    inputs, grad = Drawn((2, 5, 3, 4)).tensors(torch.float32)
    with FlopCounterMode(display=False) as counter:
        results(Drawn((2, 5, 3, 4)), inputs, grad)
    assert counter.get_total_flops() == (8 + 20) * 2 * 5 * 5 * 3 * 4


def layer_of(channels: int, **options: Any) -> fullattn.FullyAttentional:
    torch.manual_seed(0)
    layer = fullattn.FullyAttentional(channels, gamma_init=0.7, project=False, **options)
    return layer.to(DEVICE)


def output_and_gradients(forward: Callable[[Tensor], Tensor], *wanted: Tensor) -> list[Tensor]:
    y = forward(wanted[0])
    return [y, *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_graph_breaks_agrees_with_eager(dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = layer_of(5, backend="triton")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in [(2, 5, 3, 4), (3, 5, 4, 2)][: 1 + dynamic]:
        x = torch.randn(shape, device=DEVICE, requires_grad=True)
        wanted = (x, *layer.parameters())
        for one, other in zip(
            output_and_gradients(compiled, *wanted),
            output_and_gradients(layer, *wanted),
            strict=True,
        ):
            assert_near(one, other, torch.float32, size=1.0)


@pytest.mark.parametrize("backend", ["triton", None])
def test_exported_with_free_sizes(backend: str | None) -> None:
    layer = layer_of(5, backend=backend).eval()
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    x = torch.randn(2, 5, 4, 6, device=DEVICE)
    program = torch.export.export(layer, (x,), dynamic_shapes=(free,), strict=True)
    calls_kernels = "fullattn.attend_triton" in str(program.graph)
    # By itself a program is made of PyTorch's own operators, and loads without this package.
    assert calls_kernels == (backend == "triton")
    other = torch.randn(3, 5, 7, 3, device=DEVICE)
    assert_near(program.module()(other), layer(other), torch.float32)


def _train_a_part(rank: int, store: str, results_at: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    layer = DistributedDataParallel(layer_of(4, backend="triton"))
    x = torch.randn(4, 4, 3, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    layer(x[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 0:
        torch.save([each.grad for each in layer.parameters()], results_at)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Any) -> None:
    mp.spawn(_train_a_part, (str(tmp_path / "store"), str(tmp_path / "grads")), nprocs=2)
    layer = layer_of(4, backend="triton")
    x = torch.randn(4, 4, 3, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    layer(x).square().mean().backward()
    for parameter, other in zip(layer.parameters(), torch.load(tmp_path / "grads"), strict=True):
        assert parameter.grad is not None
        assert_near(parameter.grad, other, torch.float32, size=1.0)


def test_the_layer_runs_on_it_by_name_with_its_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(17)
    x = torch.randn(2, 17, 3, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    launched: list[dict[str, Any]] = []
    run = tuning.run
    monkeypatch.setattr(tuning, "run", lambda each: (launched.append(each.constants), run(each))[1])
    with fullattn.backend("triton"):
        y = layer(x)
    assert [each["RESIDUAL"] for each in launched] == [False, True]
    assert y.is_contiguous(memory_format=torch.channels_last)
    with fullattn.backend("reference"):
        assert_near(y, layer(x), torch.float32)
    # Columns and rows alone, without a residual.
    keys = torch.randn(2, 17, 3, device=DEVICE), torch.randn(2, 17, 5, device=DEVICE)
    assert_near(
        fully_attentional(x, *keys, backend="triton"),
        fully_attentional(x, *keys, backend="reference"),
        torch.float32,
    )


@pytest.mark.parametrize("numbers", [(), (1,), (1, 5, 1, 1)], ids=str)
def test_gammas_of_other_forms(numbers: tuple[int, ...]) -> None:
    # One for each channel is added outside of the kernels.
    x = torch.randn(2, 5, 3, 4, device=DEVICE)
    keys = torch.randn(2, 5, 3, device=DEVICE), torch.randn(2, 5, 4, device=DEVICE)
    gamma = torch.rand(numbers, device=DEVICE)
    found = [
        fully_attentional(x, *keys, gamma, backend=backend) for backend in ("triton", "reference")
    ]
    assert_near(found[0], found[1], torch.float32)


def test_autocast_keeps_the_residual_as_it_was_given() -> None:
    layer = layer_of(5)
    x = torch.randn(1, 5, 3, 4, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16), fullattn.backend("triton"), torch.no_grad():
        layer.gamma.zero_()
        assert torch.equal(layer(x), x)


# What fails.


def _no_room(each: launch.Launch) -> None:
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300_000, 232_448, "shared memory")


@pytest.mark.parametrize("fails_in", ["forward", "backward"])
@pytest.mark.parametrize("gamma", [None, 0.7])
def test_a_kernel_that_does_not_fit_falls_back_once_and_right(
    gamma: float | None, fails_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Drawn((2, 5, 3, 4), layout="channels_last", gamma=gamma, scale=-0.5)
    inputs, grad = call.tensors(torch.float32)
    run = tuning.run

    def run_unless(each: launch.Launch) -> None:
        if fails_in in each.kernel:
            _no_room(each)
        with warnings.catch_warnings(action="ignore"):  # Triton's own, which are not the point
            run(each)

    monkeypatch.setattr(tuning, "run", run_unless)
    with pytest.warns(RuntimeWarning, match=r"shape \(2, 5, 3, 4\).*shared memory") as caught:
        actual = results(call, inputs, grad)
    assert len(caught) == 1
    for one, other in zip(actual, expected(call, inputs, grad), strict=True):
        assert_near(one, other, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(replace(call, seed=1), inputs, grad)  # known by now, whatever the batch


def test_running_out_of_memory_is_no_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(each: launch.Launch) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(tuning, "run", run)
    inputs, grad = Drawn((1, 3, 2, 2)).tensors(torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        results(Drawn((1, 3, 2, 2)), inputs, grad)


def test_a_configuration_that_does_not_fit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            def start(**constants: Any) -> None:
                tried.append(constants["OWN"])
                if constants["OWN"] == 128:
                    _no_room(each)

            return start

    x = torch.empty(1, 128, 16, 16, device=DEVICE)
    constants = dict.fromkeys(tuning._KEY, 0)
    each = launch.Launch("forward", {"x": x, "out": x}, constants, lambda own: 1)
    monkeypatch.setattr(tuning.kernels, "forward", Kernel())
    both = [CONFIGURATIONS["wide"], CONFIGURATIONS["small"]]
    monkeypatch.setattr(tuning, "_allowed", lambda *_: both)
    tuning.run(each)
    assert tried == [128, 32]


def test_tuned_once_for_all_batches_and_similar_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    timed: list[Any] = []

    def bench(call: Callable[[], object], quantiles: object) -> list[float]:
        call()
        timed.append(call)
        return [float(len(timed))] * 3

    tuning._tuner.cache_clear()
    monkeypatch.setattr(tuning, "_bench", bench)
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(tuning, "_may_tune", lambda: True)
    both = [CONFIGURATIONS["small"], CONFIGURATIONS["slim"]]
    monkeypatch.setattr(tuning, "_allowed", lambda *_: both)
    for shape, tunings in [((1, 17, 3, 5), 6), ((2, 17, 4, 3), 0), ((1, 40, 3, 4), 6)]:
        timed.clear()
        # Columns and rows are the same to the tuner where they lie alike, as they do in windows.
        assert_right(Drawn(shape), torch.float32)
        assert len(timed) == tunings
    assert {name for _, name in tuning.choices()} == {"small"}
    # What was tuned is not asked of the tuner again, and so runs in a CUDA graph, too.
    monkeypatch.setattr(tuning, "_tuner", None)
    assert_right(Drawn((1, 17, 2, 2)), torch.float32)
    # Where results have to be equal from run to run, what was fastest here does not count.
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(tuning, "_tuned", None)
    assert_right(Drawn((1, 17, 2, 2)), torch.float32)
