"""The Triton kernels against float64: on a GPU where there is one, otherwise interpreted.

Interpreted they run on the CPU, a program after the other, when TRITON_INTERPRET=1 is set before
Triton is imported: `make test` runs this file so. The interpreter is wrong in bfloat16.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
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
from fullattn import costs
from fullattn.attention import triton
from fullattn.functional import columns_and_rows, fully_attentional, row_similarity
from helpers import oracle
from helpers.cases import arrays, assert_near, peak_bytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip(
        "needs a GPU, or TRITON_INTERPRET=1 as `make test` sets it", allow_module_level=True
    )
if (reason := triton.BACKEND.unavailable()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fullattn.attention.triton import configurations, launch, tuning  # noqa: E402
from fullattn.attention.triton.configurations import Configuration  # noqa: E402

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True, scope="module")
def _language_patched_once_a_kernel() -> Iterator[None]:
    """Halve the time of the interpreter, which patches all of `tl` at each call of `tl.sum`.

    It does so for each kernel before, and for `tl.core`, which the functions of `tl.standard` see,
    once and for all.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patched: list[bool] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not patched:
            interpreter._patch_lang(self.fn)
            patched.append(True)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


def _sliced(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    base = x.new_full((batch, channels + 1, 2 * height, 3 * width + 1), float("nan"))
    view = base[:, 1:, ::2, 1::3]
    return view.copy_(x)


def _channels_of_wider(x: Tensor, first: int, wider: int) -> Tensor:
    """Channels from `first` on of a channels_last map with a number of channels divisible by 8."""
    batch, channels, height, width = x.shape
    base = x.new_full((batch, height, width, -(-(channels + wider) // 8) * 8), float("nan"))
    return base.permute(0, 3, 1, 2)[:, first : first + channels].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": _sliced,
    "aligned channels": lambda x: _channels_of_wider(x, 8, 16),
    "unaligned channels": lambda x: _channels_of_wider(x, 1, 1),
}
GRAD_LAYOUTS = LAYOUTS | {"expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape)}


@dataclass(frozen=True)
class Drawn:
    """One call of the operator; elements from the seed."""

    shape: tuple[int, int, int, int]
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    scale: float = 1.0
    gamma: float | None = 0.7
    keep: bool = True
    programs: int = launch._PROGRAMS
    seed: int = 0

    def tensors(self, dtype: torch.dtype) -> tuple[list[Any], Tensor]:
        """x, column_key, row_key, gamma; and a gradient of the result."""
        batch, channels, height, width = self.shape
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            elements = torch.randn(shape, generator=generator, dtype=torch.float64)
            return elements.to(DEVICE, dtype)

        x = LAYOUTS[self.layout](normal(*self.shape))
        # As the layer's Linear leaves them: the channels are neighbours.
        column_key, row_key = normal(batch, height, channels).mT, normal(batch, width, channels).mT
        gamma = None if self.gamma is None else torch.full((1,), self.gamma).to(x)
        return [x, column_key, row_key, gamma], GRAD_LAYOUTS[self.grad_layout](normal(*self.shape))


@st.composite
def calls(draw: st.DrawFn) -> Drawn:
    channels, height, width = (
        draw(st.sampled_from(sizes)) for sizes in ((1, 8, 17, 33), (1, 2, 3), (1, 2, 5))
    )
    if draw(st.booleans()):
        height, width = width, height
    return Drawn(
        shape=(draw(st.sampled_from((1, 2))), channels, height, width),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        grad_layout=draw(st.sampled_from(sorted(GRAD_LAYOUTS))),
        scale=draw(st.sampled_from((1.0, -0.5, 0.1, 0.0))),
        gamma=draw(st.sampled_from((None, 0.7, 0.0))),
        keep=draw(st.booleans()),
        programs=draw(st.sampled_from((1, 4, launch._PROGRAMS))),
        seed=draw(st.integers(0, 2**31)),
    )


@pytest.fixture(autouse=True)
def _unwritten_is_nan() -> Iterator[None]:
    # What a kernel does not write stays NaN.
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _nothing_has_failed() -> Iterator[None]:
    triton._failed.clear()
    yield
    triton._failed.clear()


def results(call: Drawn, inputs: list[Any], grad: Tensor) -> list[Tensor]:
    """The result and the gradient of every input that there is, by the kernels."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    x, column_key, row_key, gamma = inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_PROGRAMS", call.programs)
        if call.keep:
            y = triton.axial_channel_attention(x, column_key, row_key, call.scale, gamma)
        else:
            y = torch.ops.fullattn.attend_triton(*inputs, call.scale, False)[0]
        given = [each for each in inputs if each is not None]
        return [y, *torch.autograd.grad(y, given, grad.to(y.dtype))]


def expected(call: Drawn, inputs: list[Any], grad: Tensor) -> list[Tensor]:
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
    copies = [None if x is None else x.clone() for x in (*inputs, grad)]
    actual, exact = results(call, inputs, grad), expected(call, inputs, grad)
    # A gradient that cancels to nothing is off by the error of what cancels.
    size = 0.01 * max(each.abs().max().item() for each in exact)
    names = ("result", "x", "column_key", "row_key", "gamma")
    for name, one, other in zip(names, actual, exact, strict=False):
        assert_near(one, other, dtype, size=size, what=name)
    for x, copy in zip((*inputs, grad), copies, strict=True):
        assert x is None or torch.equal(x, copy), "an input was modified"
    assert not triton._failed


@each_dtype
@given(call=calls())
def test_result_and_every_gradient_are_those_of_float64(dtype: torch.dtype, call: Drawn) -> None:
    assert_right(call, dtype)


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_result_and_gradient_are_right_in_every_layout(layout: str) -> None:
    of_x = layout if layout in LAYOUTS else "channels_last"
    assert_right(Drawn((2, 9, 2, 3), layout=of_x, grad_layout=layout), torch.float32)


Run = Callable[[launch.Launch], None]


def rows_only(features: int, run: Run) -> Run:
    """Run the launches of the slices of so many features; the others are taken to find zeros."""

    def run_rows(each: launch.Launch) -> None:
        if not each.slices or each.slices["x"].shape[2] == features:
            run(each)
            return
        written = [each.slices.get("sums_own")]
        if each.kernel != "backward_keys":
            written += [each.slices["out_own"]]
            written += [each.arguments.get(name) for name in ("delta", "delta_sums")]
        for tensor in written:
            if tensor is not None:
                tensor.zero_()

    return run_rows


def assert_rows_right(
    channels: int, width: int, dtype: torch.dtype, run: Run = tuning.run, precision: str = "ieee"
) -> None:
    """As `assert_right` for the only row of a map, whose columns are many and of length 1."""
    last = "channels_last"
    call = Drawn((1, channels, 1, width), last, last, scale=0.1, gamma=None)
    inputs, grad = call.tensors(dtype)
    x, _, row_key, _ = inputs
    run = rows_only(width, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_PROGRAMS", 1)  # the sums of the columns' keys are one part
        results = launch.forward(*inputs, call.scale, True, precision, run)
        kept: list[Any] = list(results[1:])
        found = launch.backward(grad, *inputs, *kept, call.scale, precision, run)
    doubled = x.double().requires_grad_()
    key = row_key.double().requires_grad_()
    exact = torch.einsum("bhij, bjhw -> bihw", row_similarity(doubled, key, call.scale), doubled)
    grad_rows, grad_key = torch.autograd.grad(exact, [doubled, key], grad.double())
    tolerance = torch.float16 if precision == "tf32" and not INTERPRETED else dtype
    assert_near(results[0], exact, tolerance)
    assert_near(found[0], grad_rows, tolerance, what="x")
    assert_near(found[2], grad_key, tolerance, what="row_key")


@each_dtype
@pytest.mark.parametrize("width", [48, 97, 144, 240, 500, 512])
def test_long_slices(width: int, dtype: torch.dtype) -> None:
    assert_rows_right(24, width, dtype)


def every_configuration() -> list[Any]:
    """Each configuration with its kernel and the longest slices that it serves.

    The interpreter has no warps, stages and registers; on a GPU they are compiled for the card.
    """
    generation = tuning._generation(torch.device(DEVICE)) if not INTERPRETED else None
    longest: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for of, kinds in configurations._table().items():
        if generation not in (None, of):
            continue
        for kind, by_kernel in kinds.items():
            for kernel, by_class in by_kernel.items():
                for most, entries in by_class.items():
                    for entry in (Configuration(**each) for each in entries):
                        cut = (entry.block_m, entry.block_n, entry.box)
                        key = (kind, kernel, entry) if generation else cut
                        case = (kernel, kind, int(most), entry)
                        longest[key] = max(longest.get(key, case), case, key=lambda c: c[2])
    return [
        pytest.param(*case, id=" ".join(map(str, case[generation is None :])).replace(",", ""))
        for case in longest.values()
    ]


@pytest.mark.parametrize(("kernel", "kind", "most", "entry"), every_configuration())
def test_every_configuration_is_right(
    kernel: str, kind: str, most: int, entry: Configuration
) -> None:
    def run(each: launch.Launch) -> None:
        # A cut that is interpreted is that of all three kernels.
        if each.slices and (INTERPRETED or each.kernel == kernel):
            tuning.launch(each, entry)
        else:
            tuning.run(each)

    # Two blocks of tokens at least with a rest, and a rest in the last box.
    tokens = max(entry.block_m, entry.block_n) + 8
    dtype = torch.float16 if kind == "half" and not INTERPRETED else torch.float32
    precision = "tf32" if kind == "tf32" else "ieee"
    assert_rows_right(tokens, most - 3, dtype, run, precision)


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [128, 132])
def test_many_channels(channels: int, layout: str, dtype: torch.dtype) -> None:
    assert_right(Drawn((1, channels, 1, 2), layout=layout, grad_layout=layout), dtype)


@each_dtype
def test_scores_beyond_the_largest_float16(dtype: torch.dtype) -> None:
    inputs, _ = Drawn((1, 4, 2, 3), gamma=None).tensors(torch.float64)
    x, column_key, row_key, _ = (
        None if each is None else (each * 300).to(dtype) for each in inputs
    )
    scores = torch.einsum("bihw,bjh->bwij", x.double(), column_key.double())
    assert scores.abs().max() > 65504
    y = triton.axial_channel_attention(x, column_key, row_key)
    exact = columns_and_rows(x.double(), column_key.double(), row_key.double(), 1.0)
    assert_near(y, exact, dtype)


@each_dtype
@pytest.mark.parametrize("scale", [0.37, -0.37])
def test_scores_near_a_million_that_differ_by_a_few(scale: float, dtype: torch.dtype) -> None:
    # All are integers, exact in every dtype, and so are their products in float32: what is off is
    # the softmax. A log-sum-exp near 5e5 would be rounded to 1/32, 2% of a weight.
    batch, channels, height, width = 1, 12, 3, 4
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        drawn = torch.randint(-2, 3, shape, generator=generator)
        return drawn.to(DEVICE, torch.float64)

    x = integers(batch, channels, height, width)
    x[:, :, 0], x[..., 0] = 1000, 1000
    column_key, row_key = integers(batch, channels, height), integers(batch, channels, width)
    column_key[..., 0], row_key[..., 0] = 1000, 1000
    column_key[..., 2], row_key[..., 3] = -column_key[..., 1], -row_key[..., 1:3].sum(-1)
    grad = integers(batch, channels, height, width)
    grad[:, :, 0], grad[..., 0] = 0, 0
    scores = torch.einsum("bihw,bjh->bwij", x, column_key)
    differences = (scores[..., :, None] - scores[..., None, :]).abs()
    assert scores.min() > 990_000
    assert {0, 1, 2, 3} <= set(differences.flatten().int().tolist())

    call = Drawn((batch, channels, height, width), scale=scale, gamma=None)
    inputs = [each.to(dtype) for each in (x, column_key, row_key)]
    with np.errstate(over="ignore", invalid="ignore"):  # of weights beyond the last channel
        actual = results(call, [*inputs, None], grad.to(dtype))
    exact = expected(call, [x, column_key, row_key, None], grad)
    # Of the positions and features that are not 1000, which would hide an error.
    small = [
        (y[..., 1:, 1:], grad_x[..., 1:, 1:], *(key[..., 1:] for key in grad_keys))
        for y, grad_x, *grad_keys in (actual, exact)
    ]
    for name, one, other in zip(("y", "x", "column_key", "row_key"), *small, strict=True):
        assert_near(one, other, dtype, what=name)


def test_no_gradient_for_what_needs_none() -> None:
    (x, column_key, row_key, gamma), grad = Drawn((1, 16, 2, 3)).tensors(torch.float32)
    x.requires_grad_()
    y = triton.axial_channel_attention(x, column_key, row_key, 1.0, gamma)
    y.backward(grad)
    assert x.grad is not None
    assert column_key.grad is row_key.grad is gamma.grad is None


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_a_result_whose_gradient_is_undefined() -> None:
    (x, column_key, row_key, gamma), _ = Drawn((1, 8, 2, 3)).tensors(torch.float32)
    x.requires_grad_()
    y = triton.axial_channel_attention(x, column_key, row_key, 1.0, gamma)
    (found,) = torch.autograd.grad(_WithoutGradient.apply(y).sum(), x, allow_unused=True)
    assert found is None or not found.any()


@pytest.mark.parametrize("mode", ["no_grad", "nothing requires one"])
def test_nothing_is_kept_where_no_gradient_is_needed(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    forward = launch.forward

    def recorded(*arguments: Any) -> Any:
        found = forward(*arguments)
        kept.append(found[3])
        return found

    monkeypatch.setattr(launch, "forward", recorded)
    call = Drawn((1, 9, 2, 3))
    inputs, _ = call.tensors(torch.float32)
    x, column_key, row_key, gamma = inputs
    if mode == "no_grad":
        x.requires_grad_()
    with torch.set_grad_enabled(mode != "no_grad"):
        y = triton.axial_channel_attention(x, column_key, row_key, 1.0, gamma)
    assert [each.numel() for each in kept] == [0]
    attended = columns_and_rows(x.double(), column_key.double(), row_key.double(), 1.0)
    exact = gamma.double() * attended + x
    assert_near(y, exact, torch.float32)


@pytest.mark.parametrize("shape", [(0, 8, 3, 4), (2, 0, 3, 4), (2, 8, 0, 4), (2, 8, 3, 0)])
def test_an_empty_map(shape: tuple[int, int, int, int]) -> None:
    call = Drawn(shape)
    inputs, grad = call.tensors(torch.float32)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results(call, inputs, grad))


@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.float64])
def test_result_has_the_wider_dtype_of_x_and_gamma(gamma_dtype: torch.dtype) -> None:
    # What autocast leaves of x with a parameter that stays float32.
    call = Drawn((1, 17, 2, 3))
    inputs, grad = call.tensors(torch.float16)
    inputs[3] = inputs[3].to(gamma_dtype)
    actual = results(call, inputs, grad)
    assert [each.dtype for each in actual] == [gamma_dtype, *[torch.float16] * 3, gamma_dtype]
    for one, other in zip(actual, expected(call, inputs, grad), strict=True):
        assert_near(one, other, torch.float16)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_have_the_layouts_of_their_inputs(layout: str) -> None:
    call = Drawn((2, 16, 2, 3), layout=layout)
    inputs, grad = call.tensors(torch.float32)
    inputs[1] = inputs[1].contiguous()  # the layer's row key is not
    y, *grads = results(call, inputs, grad)
    assert y.stride() == inputs[0].stride()
    for one, other in zip(grads, inputs, strict=True):
        assert one.stride() == other.stride()


def test_images_do_not_influence_each_other() -> None:
    call = Drawn((3, 17, 2, 3))
    inputs, grad = call.tensors(torch.float32)
    x, column_key, row_key, gamma = inputs
    # What is not finite in one image stays in it.
    x[2], column_key[2], grad[2] = float("inf"), float("nan"), float("nan")
    with np.errstate(invalid="ignore"):
        together = results(call, inputs, grad)
    for image in range(2):
        part = slice(image, image + 1)
        alone = results(call, [x[part], column_key[part], row_key[part], gamma], grad[part])
        for one, other in zip(together[:4], alone[:4], strict=True):
            assert_near(one[part], other, torch.float32)


def test_two_runs_are_bit_equal() -> None:
    call = Drawn((2, 20, 2, 5), programs=4)
    inputs, grad = call.tensors(torch.float32)
    for one, other in zip(results(call, inputs, grad), results(call, inputs, grad), strict=True):
        assert torch.equal(one, other)


def test_two_backwards_through_one_forward_are_bit_equal() -> None:
    inputs, grad = Drawn((1, 9, 2, 3)).tensors(torch.float32)
    x, column_key, row_key, gamma = (each.requires_grad_() for each in inputs)
    y = triton.axial_channel_attention(x, column_key, row_key, 1.0, gamma)
    once, again = (torch.autograd.grad(y, inputs, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*each) for each in zip(once, again, strict=True))


def test_saved_tensors_may_lose_their_layout() -> None:
    # As `save_on_cpu` with pinned memory, or other hooks of saved tensors, give them back.
    call = Drawn((1, 8, 2, 4), layout="channels_last")
    inputs, grad = call.tensors(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        actual = results(call, inputs, grad)
    for one, other in zip(actual, expected(call, inputs, grad), strict=True):
        assert_near(one, other, torch.float32)


# Means.


@each_dtype
@pytest.mark.parametrize("shape", [(2, 5, 3, 35), (1, 130, 2, 3)])
def test_means_and_their_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    x.requires_grad_()
    means = triton.axial_means(x)
    assert means is not None
    grads = [torch.randn_like(each) for each in means]
    doubled = x.detach().double().requires_grad_()
    exact = (doubled, doubled.mean(3).mT, doubled.mean(2).mT)
    assert torch.equal(means[0], x)
    for one, other in zip(means[1:], exact[1:], strict=True):
        assert_near(one, other, dtype)
    (found,) = torch.autograd.grad(means, x, grads)
    (right,) = torch.autograd.grad(exact, doubled, [each.double() for each in grads])
    assert_near(found, right, dtype)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_of_one_mean_alone() -> None:
    x = torch.randn(1, 4, 2, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    means = triton.axial_means(x)
    assert means is not None
    (found,) = torch.autograd.grad(means[1].sum(), x)
    assert_near(found, torch.full_like(x, 1 / 3), torch.float32)


def test_means_are_left_to_pytorch_for_maps_that_are_not_channels_last() -> None:
    x = torch.randn(2, 4, 2, 3, device=DEVICE)
    assert triton.axial_means(x) is None
    last = x.contiguous(memory_format=torch.channels_last)
    assert triton.axial_means(last[:0]) is None
    assert triton.axial_means(last.double()) is None


# Part of PyTorch.


def test_operator_checks() -> None:
    inputs, grad = Drawn((2, 3, 2, 3)).tensors(torch.float32)
    differentiable = tuple(None if x is None else x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.fullattn.attend_triton.default, (*differentiable, 1.0, True))
    without_gamma = (*(x for x in inputs[:3]), None, -0.5, False)
    torch.library.opcheck(torch.ops.fullattn.attend_triton.default, without_gamma)
    x, column_key, row_key, gamma = (None if x is None else x.detach() for x in inputs)
    kept = torch.ops.fullattn.attend_triton(x, column_key, row_key, gamma, 1.0, True)[1:]
    torch.library.opcheck(
        torch.ops.fullattn.attend_triton_backward.default,
        (grad, x, column_key, row_key, gamma, *kept, 1.0),
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


@pytest.mark.parametrize(
    ("dynamic", "memory_format"),
    [(False, torch.channels_last), (True, torch.contiguous_format)],
    ids=["static, channels_last", "dynamic, contiguous"],
)
def test_compiled_without_graph_breaks_agrees_with_eager(
    dynamic: bool, memory_format: torch.memory_format
) -> None:
    torch._dynamo.reset()
    layer = layer_of(5, backend="triton")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in [(2, 5, 2, 3), (3, 5, 3, 2)][: 1 + dynamic]:
        x = torch.randn(shape, device=DEVICE).to(memory_format=memory_format).requires_grad_()
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
    # Otherwise a process sometimes aborts at exit, while threads of the process group still run.
    del layer
    dist.barrier()
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
    layer = layer_of(16)
    x = torch.randn(2, 16, 2, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    launched: list[launch.Launch] = []
    run = tuning.run

    def recorded(each: launch.Launch) -> None:
        launched.append(each)
        run(each)

    monkeypatch.setattr(tuning, "run", recorded)
    with fullattn.backend("triton"):
        y = layer(x)
    assert [each.kernel for each in launched] == ["means", "forward", "forward"]
    assert [each.constants["RESIDUAL"] for each in launched[1:]] == [False, True]
    assert y.is_contiguous(memory_format=torch.channels_last)
    with fullattn.backend("reference"):
        assert_near(y, layer(x), torch.float32)
    # Columns and rows alone, without a residual.
    keys = torch.randn(2, 16, 2, device=DEVICE), torch.randn(2, 16, 3, device=DEVICE)
    assert_near(
        fully_attentional(x, *keys, backend="triton"),
        fully_attentional(x, *keys, backend="reference"),
        torch.float32,
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_gradients_of_the_layer(layout: str) -> None:
    # In channels_last its means are computed by a kernel, too.
    layer = layer_of(8, backend="triton")
    exact = layer_of(8, backend="reference").double()
    x = LAYOUTS[layout](torch.randn(2, 8, 2, 3, device=DEVICE)).requires_grad_()
    doubled = x.detach().double().requires_grad_()
    for one, other in zip(
        output_and_gradients(layer, x, *layer.parameters()),
        output_and_gradients(exact, doubled, *exact.parameters()),
        strict=True,
    ):
        assert_near(one, other, torch.float32, size=1.0)


def test_second_derivatives_of_the_layer() -> None:
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        layer = fullattn.FullyAttentional(8, project=False, gamma_init=0.7, backend=backend)
        layer = layer.to(DEVICE)
        x = torch.randn(1, 8, 5, 6).contiguous(memory_format=torch.channels_last)
        x = x.to(DEVICE).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, *layer.parameters()]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
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


def _does_not_fit(each: launch.Launch) -> None:
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
            _does_not_fit(each)
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
    entries = [Configuration(m, 16, 16, 4, 1) for m in (64, 32, 16)]
    start = tuning.launch
    tried: list[int] = []
    fits: set[int] = set()

    def launch_if_it_fits(each: launch.Launch, entry: Configuration | None = None) -> None:
        if entry is not None:
            tried.append(entry.block_m)
            if entry.block_m not in fits:
                _does_not_fit(each)
        start(each, entry)

    monkeypatch.setattr(tuning, "launch", launch_if_it_fits)
    monkeypatch.setattr(tuning, "allowed", lambda each: entries)
    call = Drawn((1, 16, 1, 2), layout="channels_last")
    for fitting, attempts in ({64, 32, 16}, [64]), ({32}, [64, 32]), ({16}, [64, 32, 16]):
        fits = fitting
        tried.clear()
        assert_right(call, torch.float32)
        assert tried == attempts * 6
    fits = set()
    with pytest.warns(RuntimeWarning, match="shared memory"):
        results(call, *call.tensors(torch.float32))
