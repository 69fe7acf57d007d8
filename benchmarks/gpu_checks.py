"""The Triton kernels on a GPU against float64; `gpu.py` times nothing if one of them is wrong."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fullattn.attention import triton
from fullattn.attention.triton import kernels, launch, tuning
from fullattn.functional import columns_and_rows

__all__ = [
    "DTYPES",
    "FORMATS",
    "SHAPES",
    "TINY",
    "TOLERANCE",
    "Check",
    "Shape",
    "check_bit_equal",
    "checks",
    "compile_all",
]

Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [
    (8, 512, 96, 96),
    (8, 512, 97, 97),
    (2, 2048, 64, 64),
    (1, 512, 128, 256),
    (16, 128, 64, 64),
]
TINY: list[Shape] = [(2, 16, 3, 4)]
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# Fewer in the other dtypes: most of the time goes into compiling.
CHECKED: dict[str, list[Shape]] = {
    "bfloat16": [
        (1, 1, 1, 1),
        (3, 40, 7, 18),
        (1, 512, 96, 97),
        (1, 300, 65, 130),
        (1, 33, 256, 5),
        (1, 48, 1, 512),
        (70_000, 3, 1, 2),
    ],
    "float16": [(3, 40, 7, 18), (1, 512, 96, 97)],
    "float32": [(3, 40, 7, 18), (1, 512, 96, 97)],
}
LARGEST: Shape = (2, 72, 20, 33)
# By how much a result may differ from float64's, relative to its largest element.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Check:
    """The largest relative error of each result of the operator at one shape."""

    shape: Shape
    dtype: str
    layout: str
    errors: dict[str, float]
    passed: bool


def check(
    shape: Shape,
    dtype: torch.dtype,
    layout: str,
    device: torch.device,
    *,
    largest: bool = False,
) -> Check:
    """Compare the operator, forward and every gradient, with float64 on the same device.

    Args:
        shape: of the feature map.
        dtype: of the inputs.
        layout: of the feature map: a memory format, or "sliced".
        device: where to compute.
        largest: whether to take scores near 1e6, of integers, which are exact in float32.

    Returns:
        The errors.
    """
    batch, channels, height, width = shape

    # Fresh elements for every check: no seed.
    def draw(*sizes: int) -> Tensor:
        if largest:
            return torch.randint(-2, 3, sizes, device=device).to(dtype)
        return torch.randn(sizes, device=device).to(dtype)

    x = draw(*shape)
    # The channels of a key are neighbours, as the layer's Linear leaves them.
    column_key, row_key = draw(batch, height, channels).mT, draw(batch, width, channels).mT
    gamma, grad = torch.full((1,), 0.7).to(x), draw(*shape)
    if largest:
        # One feature gives every score 1e6, the others what tells them apart; a column or row of
        # large elements alone has equal scores. Rounded as a log-sum-exp, weights would be off.
        x[:, :, 0], x[..., 0] = 1000, 1000
        for key in (column_key, row_key):
            key[..., 0] = 1000
            key[..., -1] = -key[..., 1:-1].sum(-1)
        grad[:, :, 0], grad[..., 0] = 0, 0
    x = x.contiguous(memory_format=FORMATS.get(layout, torch.contiguous_format))
    if layout == "sliced":
        x = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]

    inputs = [each.detach().requires_grad_() for each in (x, column_key, row_key, gamma)]
    y = triton.axial_channel_attention(*inputs[:3], 0.5, inputs[3])
    actual = [y, *torch.autograd.grad(y, inputs, grad)]

    exact = [torch.zeros_like(each, dtype=torch.float64) for each in actual]
    # A few images at a time: float64's maps are large.
    step = max(1, 2**28 // (channels * channels * (height + width)))
    for first in range(0, batch, step):
        part = slice(first, first + step)
        given = [each[part].detach().double().requires_grad_() for each in inputs[:3]]
        given.append(gamma.double().requires_grad_())
        result = given[3] * columns_and_rows(*given[:3], scale=0.5) + given[0]
        *found, to_gamma = torch.autograd.grad(result, given, grad[part].double())
        for into, each in zip(exact, [result.detach(), *found], strict=False):
            into[part] = each
        exact[4] += to_gamma
    if largest:  # of the others, whose errors the large elements would hide
        actual, exact = (
            [*(each[..., 1:, 1:] for each in of_it[:2]), *(each[..., 1:] for each in of_it[2:4])]
            for of_it in (actual, exact)
        )
    size = 0.01 * max(each.abs().max().item() for each in exact[:2])
    errors = {}
    for name, one, other in zip(
        ("result", "x", "column_key", "row_key", "gamma"), actual, exact, strict=False
    ):
        scale = max(other.abs().max().item(), size, 1e-30)
        errors[name] = ((one.double() - other).abs().max() / scale).item()
    # Not "<=" of the largest: NaN must not pass.
    passed = all(error <= TOLERANCE[dtype] for error in errors.values())
    name = layout + (", scores of 1e6" if largest else "")
    return Check(shape, str(dtype).removeprefix("torch."), name, errors, passed)


def check_means(device: torch.device, dtype: torch.dtype) -> Check:
    """Compare the means of a map, and their gradient, with float64."""
    shape = (2, 72, 17, 33)
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    found = triton.axial_means(x)
    assert found is not None, "the means of a channels_last map are the kernel's"
    exact = x.detach().double().requires_grad_()
    wanted = (exact * 1, exact.mean(3).mT, exact.mean(2).mT)
    grads = [torch.randn_like(each) for each in found]
    (grad,) = torch.autograd.grad(found, x, grads)
    (exact_grad,) = torch.autograd.grad(wanted, exact, [each.double() for each in grads])
    errors = {}
    for name, one, other in zip(
        ("x", "mean column", "mean row", "gradient"),
        (*found, grad), (*wanted, exact_grad), strict=True,
    ):  # fmt: skip
        errors[name] = ((one.double() - other).abs().max() / other.abs().max()).item()
    passed = all(error <= TOLERANCE[dtype] for error in errors.values())
    return Check(shape, str(dtype).removeprefix("torch."), "means", errors, passed)


def check_bit_equal(device: torch.device, *, rehearsal: bool) -> bool:
    """Whether two runs agree to the last bit, with memory that was not written set to NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        batch, channels, height, width = TINY[0] if rehearsal else (2, 40, 7, 18)
        x = torch.randn(batch, channels, height, width, device=device)
        keys = (
            torch.randn(batch, channels, height, device=device),
            torch.randn(batch, channels, width, device=device),
        )
        for _ in range(2):
            inputs = [each.detach().requires_grad_() for each in (x, *keys)]
            y = triton.axial_channel_attention(*inputs)
            found.append([y, *torch.autograd.grad(y, inputs, x)])
        return all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def checks(device: torch.device, *, rehearsal: bool) -> Iterator[Check]:
    """Every check."""
    # The interpreter is wrong in bfloat16.
    for name in ("float32",) if rehearsal else DTYPES:
        yield check_means(device, DTYPES[name])
        for shape in TINY if rehearsal else CHECKED[name]:
            for layout in ("contiguous", "channels_last", "sliced"):
                yield check(shape, DTYPES[name], layout, device)
        most = TINY[0] if rehearsal else LARGEST
        yield check(most, DTYPES[name], "channels_last", device, largest=True)


def compile_for(shape: Shape, dtype: str) -> str | None:
    """Compile what the operator launches at a shape into Triton's cache; says what went wrong."""
    try:
        x = torch.empty(shape, dtype=DTYPES[dtype], device="cuda")
        column_key = x.new_empty(shape[0], shape[2], shape[1]).mT
        row_key = x.new_empty(shape[0], shape[3], shape[1]).mT
        inputs = (x, column_key, row_key, x.new_empty(1))

        def run(each: launch.Launch) -> None:
            named, options = each.arguments | each.constants, {}
            if each.slices:
                entry = tuning.allowed(each)[0]
                named, options = tuning.named_arguments(each, entry), entry.options
            getattr(kernels, each.kernel).warmup(grid=(1,), **named, **options)

        for memory_format in FORMATS.values():
            x = x.contiguous(memory_format=memory_format)
            for keep in (True, False):
                y, *kept = launch.forward(x, *inputs[1:], 0.5, keep, "ieee", run)
            launch.backward(y, x, *inputs[1:], *kept, 0.5, "ieee", run)
    except Exception as problem:
        return f"{shape} {dtype}: {type(problem).__name__}: {problem}"[:200]
    return None


def compile_all(shapes: list[Shape], dtypes: list[str]) -> list[str]:
    """Compile for every check and every shape, in as many processes as there are cores."""
    jobs = [(shape, dtype) for dtype in dtypes for shape in shapes]
    jobs += [(shape, name) for name, of_it in CHECKED.items() for shape in (*of_it, LARGEST)]
    count = max(1, (os.cpu_count() or 2) - 3)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool:
        return [each for each in pool.map(compile_for, *zip(*jobs, strict=True)) if each]
