"""The Triton kernels compiled ahead of time, for GPUs that are not here: what became of them.

Compiled are the launches that the library itself would make for a shape, taken from tensors without
memory, in the configurations that are committed.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fullattn.attention import triton as backend
from helpers.launches import CHANNELS_LAST, CONTIGUOUS, SHAPES, inputs_of, launches_of, map_of

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)
if (reason := backend._missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fullattn.attention.triton import configurations, kernels, launch, means, tuning
from fullattn.attention.triton.configurations import (
    AMPERE,
    HOPPER,
    Configuration,
    candidates,
    power_of_two,
)

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory that one program may have, by compute capability (CUDA C++ programming guide).
SHARED = {80: 163 * 1024, 90: 227 * 1024}
GENERATIONS = {80: AMPERE, 90: HOPPER}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"


def source(each: launch.Launch, entry: Configuration | None) -> ASTSource:
    """What Triton's own launcher compiles for these arguments."""
    kernel = getattr(kernels, each.kernel)
    values = each.arguments | each.constants
    if entry is not None:
        values = tuning.named_arguments(each, entry)
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        aligned = isinstance(value, Tensor)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, tuning.TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
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
    def of(cls, from_source: ASTSource, entry: Configuration | None, capability: int) -> Compiled:
        compiled = triton.compile(
            from_source,
            target=GPUTarget("cuda", capability, 32),
            options={} if entry is None else entry.options,
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

    @property
    def spills_in_loops(self) -> int:
        """Accesses of local memory in the innermost loops of matrix products."""
        lines = self.machine_code.splitlines()
        labels: dict[str, int] = {}
        loops: list[range] = []
        for number, line in enumerate(lines):
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = number
            elif (jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) and jump[1] in labels:
                loops.append(range(labels[jump[1]], number))
        innermost: list[range] = []
        for each in sorted(loops, key=len):
            has_products = any("MMA" in lines[n] for n in each)
            if has_products and all(max(each[0], o[0]) > min(each[-1], o[-1]) for o in innermost):
                innermost.append(each)
        spills = (re.search(r"\b(STL|LDL)\b", lines[n]) for each in innermost for n in each)
        return sum(found is not None for found in spills)

    @property
    def hopper_widths(self) -> list[int]:
        """Columns of each of Hopper's own matrix instructions, which take groups of four warps."""
        return [int(n) for n in re.findall(r"\bHGMMA\.64x(\d+)x", self.machine_code)]


def allowed(each: launch.Launch, capability: int) -> tuple[Configuration | None, ...]:
    if not each.slices:
        return (None,)
    x = each.slices["x"]
    return candidates(
        each.kernel,
        features=x.shape[2],
        channels=power_of_two(x.shape[3]),
        element_size=x.element_size(),
        precision=each.constants["PRECISION"],
        generation=GENERATIONS[capability],
    )


Case = tuple[launch.Launch, ASTSource, Configuration | None]


def distinct(cases: Iterator[tuple[launch.Launch, Configuration | None]]) -> Iterator[Case]:
    seen = set()
    for each, entry in cases:
        made = source(each, entry)
        key = (each.kernel, entry, str(made.signature), str(made.constants), str(made.attrs))
        if key not in seen:
            seen.add(key)
            yield each, made, entry


def problems_of(case: Case, capability: int, most_stack: int | None) -> list[str]:
    """Everything that is wrong with a compiled kernel; without a most for the stack, any is right.

    On Hopper all products of half precision in blocks of 64 tokens or more take its own matrix
    instruction, which takes a group of four warps.
    """
    each, made, entry = case
    compiled = Compiled.of(made, entry, capability)
    features = each.slices["x"].shape[2] if each.slices else 0
    problems = []
    if most_stack is not None:
        if compiled.stack > most_stack:
            problems.append(f"{compiled.stack} bytes of stack")
        if (spills := compiled.spills_in_loops) and features <= 128:
            problems.append(f"{spills} accesses of local memory in a loop")
    if compiled.shared > SHARED[capability]:
        problems.append(f"{compiled.shared} bytes of shared memory")
    if re.search(r"\b(atom|red)\.", compiled.ptx):
        problems.append("atomics")
    if entry is not None:
        dtype, precision = each.slices["x"].dtype, each.constants["PRECISION"]
        own, others = bool(compiled.hopper_widths), compiled.count("HMMA") > 0
        if dtype == torch.float32 and precision == "ieee":
            if own or others:
                problems.append("products in TF32, which was not asked for")
        elif capability >= 90 and entry.block_m >= 64 and dtype != torch.float32:
            if not own or others:
                problems.append("products without Hopper's matrix instruction")
            if features >= 64 and min(compiled.hopper_widths, default=0) < 32:
                problems.append(f"products of {compiled.hopper_widths} columns")
        elif not others and not own:
            problems.append("no tensor cores")
        # Descriptors are the tensor memory accelerator's on Hopper, and addresses on Ampere.
        if (capability >= 90) != (compiled.count("UTMALDG") > 0):
            problems.append("boxes are not loaded as a whole")
    return [f"{each.kernel} {entry} D={features}: {problem}" for problem in problems]


def _name(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).removeprefix("torch.")


def first_of(
    shape: tuple[int, ...],
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "ieee",
    memory_format: torch.memory_format = CHANNELS_LAST,
) -> Iterator[Case]:
    """Every launch of a forward and a backward in its first configuration."""
    forward, backward = launches_of(
        inputs_of(map_of(shape, dtype, memory_format)), precision=precision
    )
    return distinct((each, allowed(each, capability)[0]) for each in forward + backward)


# Bytes that the fastest configurations measured leave on the stack, outside of their loops.
MOST_STACK = 128
# Where the order was not measured but is by compiling, so far with a stack: `configurations`.
HALF, SINGLE = torch.bfloat16, torch.float32
COMMON = [
    *((90, shape, HALF, "ieee", MOST_STACK) for shape in SHAPES),
    (90, (16, 128, 64, 64), SINGLE, "ieee", 0),
    (80, (8, 512, 97, 97), HALF, "ieee", None),
    (80, (16, 128, 64, 64), SINGLE, "tf32", None),
]
MORE = [
    (capability, shape, dtype, precision, None)
    for capability in (80, 90)
    for shape in [*SHAPES, (8, 512, 65, 65), (1, 512, 129, 257), (8, 500, 97, 97)]
    for dtype, precision in [
        (torch.bfloat16, "ieee"),
        (torch.float16, "ieee"),
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
    ]
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shape", "dtype", "precision", "most_stack"),
    COMMON + (MORE if DEEP else []),
    ids=_name,
)
def test_common_shapes_stay_in_registers_and_use_tensor_cores(
    capability: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    precision: str,
    most_stack: int | None,
) -> None:
    problems = []
    for case in first_of(shape, capability, dtype, precision):
        problems += problems_of(case, capability, most_stack)
    assert not problems, "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_copies_read_and_write_16_bytes_at_a_time(capability: int) -> None:
    shape = (8, 512, 96, 96)
    copies = [
        case
        for case in first_of(shape, capability, memory_format=CONTIGUOUS)
        if case[0].kernel == "copy"
    ]
    assert len(copies) == 2  # into channels_last and back
    for _, made, entry in copies:
        compiled = Compiled.of(made, entry, capability)
        assert (compiled.stack, compiled.spills_in_loops) == (0, 0)
        for kind in ("LDG", "STG"):
            assert re.search(rf"{kind}\S*\.128", compiled.machine_code)


@pytest.mark.slow
def test_means_and_their_gradient_stay_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[launch.Launch] = []
    monkeypatch.setattr(tuning, "run", found.append)
    x = map_of((8, 512, 97, 97)).requires_grad_()
    outputs = means.AxialMeans.apply(x)
    torch.autograd.grad(outputs, x, [torch.empty_like(each) for each in outputs])
    assert [each.kernel for each in found] == ["means", "spread"]
    for case in distinct((each, None) for each in found):
        assert problems_of(case, 90, most_stack=0) == []
        compiled = Compiled.of(case[1], None, 90)
        assert re.search(r"LDG\S*\.(64|128)", compiled.machine_code)


def entries_of(generation: str, kind: str) -> Iterator[tuple[str, int, Configuration]]:
    """Every configuration with its kernel and class of features."""
    for kernel, by_class in configurations._table()[generation][kind].items():
        for most, entries in by_class.items():
            yield from ((kernel, int(most), Configuration(**each)) for each in entries)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"] if DEEP else ["half"])
@pytest.mark.parametrize("capability", [80, 90])
def test_every_configuration_fits_the_shared_memory(capability: int, kind: str) -> None:
    """In every run for those of each kernel that buffer most; in a deep run for all."""
    chosen: dict[Any, tuple[int, str, int, Configuration]] = {}
    for kernel, most, entry in entries_of(GENERATIONS[capability], kind):
        if (capability, kind, kernel, most) == (80, "tf32", "backward_keys", 512):
            continue  # fits in no configuration: PyTorch's operators run, with one warning
        buffered = most * (entry.block_m + entry.stages * entry.block_n)
        case = (buffered, kernel, most, entry)
        key = (kernel, most, entry) if DEEP else kernel
        chosen[key] = max(chosen.get(key, case), case, key=lambda each: each[0])
    dtype, precision = (HALF, "ieee") if kind == "half" else (SINGLE, kind)
    problems = []
    for _, kernel, most, entry in chosen.values():
        inputs = inputs_of(map_of((1, 512, most, most), dtype))
        forward, backward = launches_of(inputs, precision=precision)
        each = next(each for each in reversed(forward + backward) if each.kernel == kernel)
        made = source(each, entry)
        target = GPUTarget("cuda", capability, 32)
        shared = triton.compile(made, target=target, options=entry.options).metadata.shared
        if shared > SHARED[capability]:
            problems.append(f"{kernel} {entry} D={most}: {shared} bytes of shared memory")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("box", [16, 32, 64, 128])
def test_boxes_cover_the_features_closely(box: int) -> None:
    for features in range(16, 513, 16):
        widths = kernels.widths(features, box)
        *full, last = widths
        assert set(full) <= {box}
        assert 16 <= last <= box
        assert sum(widths) - last < features <= sum(widths)
        assert last < 2 * max(features - sum(full), 8)


def test_a_compiled_kernel_is_launched_again_only_for_what_it_was_compiled_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The package keeps compiled kernels itself, by a key that has to tell all of them apart."""
    now: list[str] = []
    reused = 0

    class Kernel:
        """Takes the place of a kernel, and remembers what it was first compiled for."""

        def __init__(self, name: str) -> None:
            self.arg_names = getattr(kernels, name).arg_names

        def __getitem__(self, grid: object) -> Any:
            return lambda **named: Known(now[0])

    class Known:
        def __init__(self, compiled_for: str) -> None:
            self.compiled_for = compiled_for

        def __getitem__(self, grid: object) -> Any:
            return self.start

        def start(self, *arguments: object) -> None:
            nonlocal reused
            reused += 1
            assert now[0] == self.compiled_for

    names = ("forward", "backward_queries", "backward_keys", "finish", "copy")
    stubs = SimpleNamespace(widths=kernels.widths, **{name: Kernel(name) for name in names})
    monkeypatch.setattr(tuning, "kernels", stubs)
    monkeypatch.setattr(tuning, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for shape, dtype, gamma_dtype, keep, memory_format in itertools.product(
        [(2, 512, 97, 96), (1, 500, 16, 17), (2, 512, 1, 3)],
        [torch.float16, torch.bfloat16, torch.float32],
        [torch.float16, torch.float32, torch.float64, None],
        [True, False],
        [CHANNELS_LAST, CONTIGUOUS],
    ):
        x, column_key, row_key, gamma = inputs_of(map_of(shape, dtype, memory_format))
        scaled = None if gamma_dtype is None else gamma.to(gamma_dtype)
        for scale in (1.0, -1.0):
            forward, backward = launches_of(
                (x, column_key, row_key, scaled), keep=keep, scale=scale
            )
            for each in forward + backward:
                entry = allowed(each, 90)[0]
                made = source(each, entry)
                now[:] = [f"{each.kernel} {entry} {made.signature} {made.constants} {made.attrs}"]
                tuning.launch(each, entry)
    assert reused > 100
