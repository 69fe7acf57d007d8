"""The launches of the Triton kernels: how many, of which memory, and how long the host takes.

Nothing is launched: `launch` hands what it would launch to a function, so these tests need neither
a GPU nor Triton. Tensors without memory stand for the large ones.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fullattn.attention.triton import launch
from fullattn.attention.triton.configurations import (
    AMPERE,
    CLASSES,
    HOPPER,
    candidates,
    features_class,
)
from helpers.launches import (
    CHANNELS_LAST,
    CONTIGUOUS,
    SHAPES,
    inputs_of,
    launches_of,
    map_of,
)

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def kernels_of(launches: list[launch.Launch]) -> Counter[str]:
    return Counter(each.kernel for each in launches)


FORWARD = Counter(forward=2)
BACKWARD = Counter(backward_queries=2, backward_keys=2, finish=1)


@each_shape
def test_launches_of_a_channels_last_map(shape: tuple[int, ...]) -> None:
    forward, backward = launches_of(inputs_of(map_of(shape)))
    assert kernels_of(forward) == FORWARD
    assert kernels_of(backward) == BACKWARD


@each_shape
def test_launches_of_a_contiguous_map(shape: tuple[int, ...]) -> None:
    # x is copied and the result; in the backward x, its gradient and that of the result.
    forward, backward = launches_of(inputs_of(map_of(shape, memory_format=CONTIGUOUS)))
    assert kernels_of(forward) == FORWARD + Counter(copy=2)
    assert kernels_of(backward) == BACKWARD + Counter(copy=3)


def test_attended_columns_that_were_kept_are_used() -> None:
    for keep in (True, False):
        _, backward = launches_of(inputs_of(map_of((2, 64, 5, 7))), keep=keep)
        queries = [each for each in backward if each.kernel == "backward_queries"]
        assert [each.constants["KEPT"] for each in queries] == [keep, False]


def _channels(x: Tensor, first: int, count: int) -> Tensor:
    return x[:, first : first + count]


@pytest.mark.parametrize(
    ("x", "copies"),
    [
        (_channels(map_of((2, 64, 5, 7)), 8, 16), False),
        (_channels(map_of((2, 64, 5, 7)), 8, 19), False),
        (_channels(map_of((2, 63, 5, 7)), 8, 16), True),
        (map_of((2, 16, 10, 7))[:, :, ::2], False),
        (map_of((2, 16, 5, 7)).mT, False),
        (map_of((2, 16, 5, 7)).expand(2, 16, 5, 7)[:1].expand(2, 16, 5, 7), True),
        (map_of((2, 19, 5, 7)), True),
        (map_of((2, 4, 5, 7)), True),
        (map_of((2, 4, 5, 7), torch.float32), False),
        (map_of((2, 16, 1, 7), memory_format=CONTIGUOUS), True),
        (map_of((2, 16, 1, 1), memory_format=CONTIGUOUS), False),
    ],
    ids=[
        "channels of a wider map",
        "channels of a wider map, not a multiple of 8",
        "channels of a wider map whose positions are not aligned",
        "every second row",
        "rows and columns swapped",
        "expanded",
        "19 channels",
        "4 channels of 2 bytes",
        "4 channels of 4 bytes",
        "one row, contiguous",
        "one position, contiguous",
    ],
)
def test_maps_are_copied_only_where_they_cannot_be_read(x: Tensor, copies: bool) -> None:
    copied: list[launch.Launch] = []
    found = launch._readable(x, x.dtype, copied.append)
    assert len(copied) == copies
    assert (found is x) == (not copies)
    assert launch._is_readable(found)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)


def test_a_map_that_begins_between_multiples_of_16_bytes_is_copied() -> None:
    x = torch.empty(2, 64, 3, 4, memory_format=CHANNELS_LAST)
    for first in range(8):
        assert launch._is_readable(_channels(x, first, 16)) == (first % 4 == 0)


@pytest.mark.parametrize("channels", [512, 500])
@pytest.mark.parametrize("contiguous", [False, True], ids=["transposed", "contiguous"])
def test_a_key_is_copied_in_few_programs(contiguous: bool, channels: int) -> None:
    key = torch.empty(8, 97, channels, dtype=torch.bfloat16, device="meta").mT
    key = key.contiguous() if contiguous else key
    copied: list[launch.Launch] = []
    launch._readable_key(key, key.dtype, copied.append)
    assert len(copied) == (contiguous or channels % 8 != 0)
    for each in copied:
        assert each.programs(1) == 8 * 2 * 8  # tiles of 64


@pytest.mark.parametrize("shape", [(160, 16, 512, 512), (1, 16, 512, 512)], ids=str)
def test_programs_are_counted_on_the_first_axis_of_the_grid(shape: tuple[int, ...]) -> None:
    # The others hold 65 535.
    batch, _, height, width = shape
    forward, backward = launches_of(inputs_of(map_of(shape)))
    columns, rows = (each.programs(16) for each in forward)
    assert (columns, rows) == (batch * width, batch * height)
    assert all(each.programs(16) < 2**31 for each in forward + backward)


@pytest.mark.parametrize("batch", [1, 2, 8, 300])
@pytest.mark.parametrize("slices", [1, 7, 96, 512])
@pytest.mark.parametrize("tokens", [1, 64, 512, 4096])
def test_parts_of_the_slices(batch: int, slices: int, tokens: int) -> None:
    found = launch.parts(batch, slices, tokens)
    assert 1 <= found <= slices
    programs = batch * -(-tokens // 64) * found
    assert programs <= launch._PROGRAMS or found == 1
    assert found == slices or 2 * programs > launch._PROGRAMS


# Memory.


class Allocations(TorchDispatchMode):
    """Bytes of each tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor) and not func.is_view:
                self.bytes.append(each.untyped_storage().nbytes())
        return out


@each_shape
def test_a_channels_last_map_is_not_copied(shape: tuple[int, ...]) -> None:
    inputs = inputs_of(map_of(shape))
    with Allocations() as made:
        launches_of(inputs)
    # The result, the attended columns and the gradient of x. All else together is smaller than one.
    x = inputs[0].nbytes
    assert sorted(made.bytes)[-3:] == [x, x, x]
    assert sum(sorted(made.bytes)[:-3]) < x


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 30, 5, 3)], ids=str)
def test_workspace_is_what_is_made(shape: tuple[int, ...], dtype: torch.dtype, keep: bool) -> None:
    x, column_key, row_key, gamma = inputs_of(map_of(shape, dtype, CONTIGUOUS))
    inputs = (x, column_key, row_key, gamma)
    forward, backward, kept = launch.workspace(shape, x.element_size())
    statistics = [2 * 4 * n for n in (column_key.numel(), row_key.numel())]
    padded = 16 // x.element_size()
    # Keys are copied where their channels do not fill 16 bytes.
    copies = column_key.nbytes + row_key.nbytes
    copies = copies // shape[1] * (-shape[1] % padded + shape[1]) if shape[1] % padded else 0
    with Allocations() as made:
        y, *found = launch.forward(*inputs, 1.0, keep, "ieee", lambda each: None)
    left: list[Any] = found
    result = y.nbytes + sum(statistics) + keep * kept
    assert sum(made.bytes) == result + forward + copies
    with Allocations() as made:
        grads = launch.backward(y, *inputs, *left, 1.0, "ieee", lambda each: None)
    # The gradients of the keys are made once more where they are put into the keys' layout.
    results = sum(each.nbytes for each in grads)
    assert sum(made.bytes) == results + backward + copies


# Time of the host, which is what a small map takes.


def microseconds(call: Callable[[], object]) -> float:
    """Median time of a call, the least of several medians."""
    medians = []
    for _ in range(5):
        times = []
        for _ in range(100):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    return min(medians) * 1e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory_format", "most_forward", "most_backward"),
    # Three times what is aimed at, 100 and 250 µs without copies: machines that run tests are slow.
    [(CHANNELS_LAST, 300, 750), (CONTIGUOUS, 600, 1200)],
    ids=["channels_last", "contiguous"],
)
def test_time_of_the_host(
    memory_format: torch.memory_format, most_forward: float, most_backward: float
) -> None:
    x = torch.empty(1, 8, 2, 3).to(memory_format=memory_format)
    inputs = inputs_of(x)

    def nothing(each: launch.Launch) -> None:
        pass

    def forward() -> Any:
        return launch.forward(*inputs, 1.0, True, "ieee", nothing)

    found = forward()
    y, kept = found[0], found[1:]

    def backward() -> Any:
        return launch.backward(y, *inputs, *kept, 1.0, "ieee", nothing)

    assert microseconds(forward) < most_forward
    assert microseconds(backward) < most_backward


# Configurations.


@pytest.mark.parametrize("generation", [AMPERE, HOPPER])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_there_is_a_configuration_for_every_size(
    kernel: str, element_size: int, precision: str, generation: str
) -> None:
    for features, exponent in itertools.product((1, 17, 97, *CLASSES), range(13)):
        channels = 1 << exponent
        found = candidates(
            kernel,
            features=features,
            channels=channels,
            element_size=element_size,
            precision=precision,
            generation=generation,
        )
        assert 1 <= len(found) <= 4
        for each in found:
            assert each.block_m <= max(channels, 16)
            for size in (each.block_m, each.block_n, each.box):
                assert size >= 16
                assert size & (size - 1) == 0
            # A box that is wider than the features would only read zeros.
            assert each.box < 2 * features_class(features)
