"""The Triton kernels compiled ahead of time, for GPUs that are not here: what became of them.

Compiled are the launches that the library itself would make for a shape, taken from tensors without
memory, in every configuration that autotuning may choose for it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fullattn.attention import triton as backend

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
if (reason := backend._missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fullattn.attention.triton import kernels, launch
from fullattn.attention.triton.configurations import (
    AMPERE,
    CLASSES,
    HOPPER,
    Configuration,
    candidates,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory that one program may have, by compute capability (CUDA C++ programming guide).
SHARED = {80: 163 * 1024, 90: 227 * 1024}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


def launches(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    memory_format: torch.memory_format = torch.contiguous_format,
    precision: str = "ieee",
) -> list[launch.Launch]:
    """Every launch of a forward and a backward."""
    batch, channels, height, width = shape
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    # The layouts in which the layer's Linear leaves the keys.
    column_key = x.new_empty(batch, height, channels).mT
    row_key = x.new_empty(batch, width, channels).mT
    gamma = x.new_empty(1)
    found: list[launch.Launch] = []
    inputs = (x, column_key, row_key, gamma)
    y, *lse = launch.forward(*inputs, 1.0, precision, found.append)
    launch.backward(y, *inputs, *lse, 1.0, precision, found.append)
    return found


def source(each: launch.Launch, configuration: Configuration) -> ASTSource:
    """What Triton's own launcher compiles for these arguments."""
    kernel = getattr(kernels, each.kernel)
    values = each.arguments | each.constants | configuration.constants
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        aligned = isinstance(value, Tensor)
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned and not parameter.is_constexpr:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a kernel."""

    shared: int
    stack: int
    registers: int
    ptx: str
    machine_code: str

    @classmethod
    def of(cls, from_source: ASTSource, configuration: Configuration, capability: int) -> Compiled:
        compiled = triton.compile(
            from_source,
            target=GPUTarget("cuda", capability, 32),
            options=configuration.options,
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage, code = (
                subprocess.run(
                    [TOOLS / command[0], *command[1:], file.name],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout
                for command in (["cuobjdump", "-res-usage"], ["nvdisasm"])
            )
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        return cls(
            compiled.metadata.shared, int(found[2]), int(found[1]), compiled.asm["ptx"], code
        )

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.machine_code))


AS_IT_IS = Configuration("as it is", 0, 0, 4, 3)


def allowed(each: launch.Launch, capability: int) -> list[Configuration]:
    if each.kernel == "copy":
        return [AS_IT_IS]
    return candidates(
        each.kernel,
        features=each.constants["FEATURES"],
        channels=each.constants["CHANNELS"],
        number_bytes=each.arguments["x"].element_size(),
        precision=each.constants["PRECISION"],
        generation=HOPPER if capability >= 90 else AMPERE,
    )


def distinct(
    found: list[launch.Launch], capability: int
) -> Iterator[tuple[launch.Launch, ASTSource, Configuration]]:
    seen = set()
    for each in found:
        for configuration in allowed(each, capability):
            made = source(each, configuration)
            key = (each.kernel, configuration, str(made.signature), str(made.constants))
            if key not in seen:
                seen.add(key)
                yield each, made, configuration


ROWS, LAST = torch.contiguous_format, torch.channels_last
COMMON = [
    (90, (8, 512, 96, 96), torch.bfloat16, ROWS, "ieee"),
    (90, (8, 512, 97, 97), torch.bfloat16, ROWS, "ieee"),
    (90, (1, 512, 128, 256), torch.bfloat16, LAST, "ieee"),
    (90, (8, 512, 96, 96), torch.float32, ROWS, "ieee"),
    (80, (8, 512, 97, 97), torch.float16, ROWS, "ieee"),
    (80, (2, 2048, 64, 64), torch.bfloat16, LAST, "ieee"),
    (80, (8, 512, 97, 97), torch.float32, ROWS, "tf32"),
]
MORE = [
    (capability, shape, dtype, memory_format, precision)
    for capability in (80, 90)
    for shape in [
        (8, 512, 96, 96),
        (8, 512, 97, 97),
        (8, 512, 65, 65),
        (1, 512, 128, 256),
        (1, 512, 129, 257),
        (2, 2048, 64, 64),
        (16, 128, 64, 64),
    ]
    for dtype, precision in [
        (torch.bfloat16, "ieee"),
        (torch.float16, "ieee"),
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
    ]
    for memory_format in (ROWS, LAST)
    # float32 beyond 128 features spills in any configuration: a limit, said in `configurations`.
    if dtype != torch.float32 or max(shape[2:]) <= 128
]


# Bytes that some configurations leave in local memory at the shapes of MORE.
STACK_ELSEWHERE = 256


def _name(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shape", "dtype", "memory_format", "precision"),
    COMMON + [case for case in MORE if DEEP and case not in COMMON],
    ids=_name,
)
def test_common_shapes_stay_in_registers_and_use_tensor_cores(
    capability: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    precision: str,
) -> None:
    case = (capability, shape, dtype, memory_format, precision)
    most_stack = 0 if case in COMMON else STACK_ELSEWHERE
    problems = []
    for each, made, configuration in distinct(
        launches(shape, dtype, memory_format, precision), capability
    ):
        compiled = Compiled.of(made, configuration, capability)
        what = f"{each.kernel} {configuration.name} D={each.arguments['D']}"
        spills = compiled.count("STL") + compiled.count("LDL")
        if compiled.stack > most_stack or (spills and not most_stack):
            problems.append(f"{what}: {compiled.stack} bytes of stack, {spills} accesses")
        if compiled.shared > SHARED[capability]:
            problems.append(f"{what}: {compiled.shared} bytes of shared memory")
        if each.kernel == "copy":
            wide = [rf"{kind}\S*\.128" for kind in ("LDG", "STG")]
            if shape[3] % 16 == 0 and not all(re.search(w, compiled.machine_code) for w in wide):
                problems.append(f"{what}: not 16 bytes at a time")
            continue
        tensor_cores = compiled.count("HGMMA"), compiled.count("HMMA")
        if dtype != torch.float32 or precision == "tf32":
            # A group of four warps is what Hopper's own matrix instruction takes: 64 tokens.
            hopper = capability >= 90 and configuration.own >= 64
            if not tensor_cores[0 if hopper else 1]:
                problems.append(f"{what}: no tensor cores")
        elif any(tensor_cores):
            problems.append(f"{what}: products in TF32, which was not asked for")
        if re.search(r"\b(atom|red)\.", compiled.ptx):
            problems.append(f"{what}: atomics")
        # On Hopper, past registers into shared memory. On Ampere Triton does that to some alone.
        in_flight = capability >= 90 and configuration.stages > 1 and dtype != torch.float32
        if not re.search(rf"LDG{'STS' if in_flight else '(STS)?'}\S*\.128", compiled.machine_code):
            problems.append(f"{what}: no 16-byte loads")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("generation", [AMPERE, HOPPER])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("number_bytes", [2, 4])
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_there_is_a_configuration_for_every_size(
    kernel: str, number_bytes: int, precision: str, generation: str
) -> None:
    for features in CLASSES:
        for channels in (1, 2, 16, 32, 64, 128, 512, 4096):
            found = candidates(
                kernel,
                features=features,
                channels=channels,
                number_bytes=number_bytes,
                precision=precision,
                generation=generation,
            )
            assert 1 <= len(found) <= 4
            assert all(each.own <= max(channels, 32) for each in found)


def test_pieces_cover_the_features_closely() -> None:
    for padded in range(16, 513, 16):
        exact, single = (kernels.pieces(padded, exact) for exact in (True, False))
        assert len(exact) <= 3
        assert padded <= sum(exact) <= sum(single) < 2 * padded
        # At most an eighth more than the features in whole units of the tensor cores.
        assert sum(exact) <= padded * 9 / 8


def test_more_slices_than_an_axis_of_a_grid_holds() -> None:
    found = launches((160, 16, 512, 512), torch.float16, LAST)
    assert max(each.programs(32) for each in found) > 65_535


def test_one_choice_serves_all_batches_and_similar_sizes() -> None:
    def keys(*shape: int) -> set[tuple[Any, ...]]:
        names = ("CHANNELS", "FEATURES", "LAYOUT", "PRECISION")
        return {
            (each.kernel, *(each.constants[name] for name in names))
            for each in launches(shape)
            if each.kernel != "copy"
        }

    assert keys(1, 512, 97, 97) == keys(16, 512, 97, 97) == keys(2, 400, 101, 110)
    assert keys(1, 512, 97, 97) != keys(1, 512, 97, 65)


class Allocations(TorchDispatchMode):
    """Bytes of each tensor that is made, and the operators that make or fill them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append(func.overloadpacket.__name__)
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor) and not func.is_view:
                self.bytes.append(each.numel() * each.element_size())
        return out


def test_no_map_and_no_copy_where_slices_are_read_in_place() -> None:
    with Allocations() as made:
        launches((8, 512, 97, 97), torch.bfloat16, LAST)
    x = 8 * 512 * 97 * 97 * 2
    # x itself, its result and its gradient. All else is a third of one of them at most; the map of
    # the columns of a single image would be as large as two thirds.
    assert sorted(made.bytes)[-3:] == [x, x, x]
    assert sorted(made.bytes)[-4] < x / 3


@pytest.mark.parametrize("shape", [(8, 512, 96, 96), (8, 512, 97, 97), (1, 2048, 256, 256)])
def test_a_window_is_no_larger_than_it_is_said_to_be(shape: tuple[int, ...]) -> None:
    with Allocations() as made:
        launches(shape)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").nbytes
    others = [size for size in made.bytes if size != x]
    sums_of_keys = 2 * launch._PROGRAMS * 64 * max(shape) * 4
    assert max(others) <= max(launch.WINDOW, sums_of_keys)


def test_windows_are_even() -> None:
    found = [each for each in launches((8, 512, 96, 96)) if each.kernel != "copy"]
    slices = [each.arguments["S"] * len(each.arguments["x"]) for each in found]
    assert max(slices) <= 2 * min(slices) or max(slices) == 8 * 96
