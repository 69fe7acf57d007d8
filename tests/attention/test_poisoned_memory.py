"""Every element of an uninitialised tensor is written before it is read, on every backend.

In deterministic mode PyTorch fills what `torch.empty` and its relatives return with NaN. An element
that stays unwritten then shows in the result or in a gradient.
The C kernel allocates its own workspace, which glibc fills with large numbers on request.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.utils.deterministic
from torch import Tensor

from fullattn.attention import native
from helpers.cases import Run, assert_near, runs

# (B, C, H, W): 1, primes, H ≠ W, no multiples of 8, more than one block of queries and keys.
SHAPES = [(2, 5, 3, 7), (1, 11, 13, 2), (3, 1, 2, 5), (1, 17, 7, 11), (1, 3, 2, 1), (1, 67, 5, 19)]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised tensors with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(run: Run, shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """Compare forward and every gradient with the oracle and with the definition in float64."""
    smallest = run.case.options.get("subsample", 1)
    shape = (*shape[:2], max(shape[2], smallest), max(shape[3], smallest))
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(shape, generator=generator, dtype=torch.float64)
    layer, definition = run.build(shape[1]), run.case.build(shape[1], backend="reference")
    x = exact.to(run.device, run.dtype).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    with poisoned():
        y = run(layer, x)
        found = torch.autograd.grad(y, [x, *layer.parameters()], weight.to(y))
    assert_near(y, run.case.expected(definition, exact), run.dtype)
    exact.requires_grad_()
    expected = torch.autograd.grad(definition(exact), [exact, *definition.parameters()], weight)
    size = 0.01 * max(gradient.abs().max().item() for gradient in expected)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other, run.dtype, size=size, what="gradient")


@runs()
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_element_stays_unwritten(run: Run, memory_format: torch.memory_format) -> None:
    for shape in SHAPES:
        check(run, shape, memory_format)


@pytest.mark.parametrize(
    "allocate",
    [
        torch.empty_like,
        lambda x: x.new_empty(x.shape),
        lambda x: torch.empty(x.shape),
        lambda x: torch.empty_strided(x.shape, x.stride()),
    ],
    ids=["empty_like", "new_empty", "empty", "empty_strided"],
)
def test_an_element_that_stays_unwritten_is_noticed(allocate: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 5)
    with poisoned():
        y = allocate(x)
        y[:-1], y[-1, :-1], y[-1, -1, :-1] = x[:-1], x[-1, :-1], x[-1, -1, :-1]
    with pytest.raises(AssertionError, match="is not finite"):
        assert_near(y, x, torch.float32)
    y[-1, -1, -1] = x[-1, -1, -1]
    assert_near(y, x, torch.float32)


PROGRAM = """
import torch
from fullattn.attention import native
from helpers.cases import FULLY_ATTENTIONAL, Run
from test_poisoned_memory import SHAPES, check

filled = torch.empty(1000).view(torch.uint8)  # from the same posix_memalign as the workspace
assert (filled == 0xFE).all(), "unfilled"
run = Run(FULLY_ATTENTIONAL, native.BACKEND, torch.float32, "cpu")
for shape in SHAPES:
    check(run, shape, torch.contiguous_format)
"""


@pytest.mark.skipif(native._unavailable() is not None, reason="needs the native kernel")
def test_the_workspace_of_the_c_kernel_is_written_before_it_is_read() -> None:
    environment = os.environ | {
        "MALLOC_PERTURB_": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "unfilled" in done.stderr:
        pytest.skip("this C library does not fill what it allocates")
    assert done.returncode == 0, done.stderr
