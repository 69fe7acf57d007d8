"""Axial channel attention on the CPU by a C kernel.

`native.c` in this folder reads the feature map by its strides, computes columns and rows in threads
and adds both into one output. A wheel for Linux carries it compiled for the levels of processors in
`_LEVELS`. Elsewhere on Linux the machine's C compiler builds it on first use (about two seconds),
for this processor; the result is kept in the folder FULLATTN_CACHE, or in `fullattn` in the user's
cache. Without either, or with FULLATTN_NATIVE=0, the next backend runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullattn.attention import flops, operators, reference
from fullattn.attention.backend import FLOATING, Backend, Setting, Workspace
from fullattn.attention.sizes import Size, maximum, minimum

__all__ = ["BACKEND", "axial_channel_attention"]

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-std=gnu11", "-O3", "-fPIC")
# Multiplications below which starting threads costs more than they save.
_WORTH_THREADS = 1_000_000

# The processors that wheels carry a kernel for, best first, and what each adds to the next, as
# Linux names it.
_LEVELS = {
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v3": "avx avx2 abm bmi1 bmi2 f16c fma movbe xsave",
    "x86-64-v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
}


class _BuildError(Exception):
    """Raised if the kernel cannot be built; the message says why, in one sentence."""


def _processor() -> frozenset[str]:
    """Return what this processor can do, by the names of Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(" ".join(line.partition(":")[2] for line in lines).split())


def _levels() -> list[str]:
    """List the processors of `_LEVELS` that this one is, best first."""
    if platform.machine() == "aarch64":
        return ["aarch64"]
    able, levels = _processor(), list(_LEVELS)
    return [
        level
        for number, level in enumerate(levels)
        if able.issuperset(" ".join(_LEVELS[each] for each in levels[number:]).split())
    ]


def _ready() -> list[Path]:
    """List the kernels that the wheel carries and this processor can run, best first."""
    paths = [_SOURCE.with_name(f"native-{level}.so") for level in _levels()]
    return [path for path in paths if path.exists()]


def _cache_folder() -> Path:
    chosen = os.environ.get("FULLATTN_CACHE")
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fullattn"
    except RuntimeError:
        raise _BuildError("no cache folder: neither FULLATTN_CACHE nor HOME is set") from None


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise _BuildError(f"the C compiler failed: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise _BuildError(f"the C compiler failed: {lines[0].strip()}")


def _is_whole(library: Path) -> bool:
    """Whether a library of the cache ends in the digest of the rest, as `_build` writes it."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _build(target: str = "native") -> Path:
    """Return the kernel for an `-march` target, compiled or from the cache."""
    flags = (*_FLAGS, f"-march={target}")
    names = os.environ.get("CC", "").split() or ["gcc", "cc", "clang"]
    compiler = next((found for name in names[:3] if (found := shutil.which(name))), None)
    if compiler is None:
        raise _BuildError(f"needs a C compiler: found none of {', '.join(names)}")
    # Machines may share a cache folder.
    machine = " ".join((platform.machine(), *sorted(_processor())))
    parts = (_SOURCE.read_bytes(), *map(str.encode, (" ".join(flags), compiler, machine)))
    name = f"native-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"
    folder = _cache_folder()
    built = folder / name
    if built.exists():
        if _is_whole(built):
            return built
        warnings.warn(
            f"fullattn: {built} is damaged, or not what fullattn wrote: it is compiled again",
            stacklevel=2,
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="building-", dir=folder))
    except OSError as error:
        raise _BuildError(f"its cache folder cannot be written: {error}") from None
    try:
        # Linked without an OpenMP library, so that the one that PyTorch has loaded is used: two
        # libraries would have two pools of threads on the same cores.
        _run([compiler, *flags, "-shared", str(_SOURCE), "-o", str(work / name)])
        content = (work / name).read_bytes()
        (work / name).write_bytes(content + hashlib.sha256(content).digest())
        # Atomic, so that another process never loads half a file.
        os.replace(work / name, built)
    except OSError as error:
        raise _BuildError(f"its cache folder cannot be written: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return built


@cache
def _kernel() -> ctypes.CDLL | str:
    """Load the kernel, ready or compiled, or return the reason why there is none."""
    if os.environ.get("FULLATTN_NATIVE") == "0":
        return "switched off by FULLATTN_NATIVE=0"
    if sys.platform != "linux":
        return f"needs Linux, not {platform.system()}"
    for ready in _ready():
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(ready))
    try:
        return ctypes.CDLL(str(_build()))
    except _BuildError as error:
        return str(error)
    except OSError as error:
        return f"the compiled kernel cannot be loaded: {error}"


def _unavailable() -> str | None:
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


# torch.compile calls this once and does not trace into it. The decorator for this purpose,
# torch.compiler.assume_constant_result, sets the same mark but imports all of torch._dynamo.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


_Sizes = ctypes.c_int64 * 4


def _call(name: str, x: Tensor, *others: Tensor | float | None) -> None:
    """Call a function of the kernel.

    Feature maps, which have 4 axes, may have any strides; other tensors are contiguous.
    """
    kernel = _kernel()
    if isinstance(kernel, str):
        raise RuntimeError(f"fullattn's native kernel is not available: {kernel}")
    if x.numel() == 0:
        return
    batch, channels, height, width = x.shape
    passed: list[Any] = [_Sizes(*x.shape)]
    for each in (x, *others):
        if each is None:
            passed.append(None)
        elif isinstance(each, float):
            passed.append(ctypes.c_float(each))
        else:
            passed.append(ctypes.c_void_p(each.data_ptr()))
            if each.dim() == 4:
                passed.append(_Sizes(*each.stride()))
    products = batch * channels * channels * height * width
    passed.append(torch.get_num_threads() if products > _WORTH_THREADS else 1)
    if getattr(kernel, name)(*passed):
        raise MemoryError(f"fullattn's native kernel ran out of memory at shape {tuple(x.shape)}")


def _forward(
    x: Tensor, column_key: Tensor, row_key: Tensor, scale: float, gamma: Tensor | None = None
) -> Tensor:
    if x.dtype != torch.float32:
        return _forward(x.float(), column_key, row_key, scale, gamma).to(x.dtype)
    # The kernel reads keys as (B, D, C), the layout in which a Linear writes them.
    keys = column_key.float().mT.contiguous(), row_key.float().mT.contiguous()
    out = torch.empty_like(x)
    _call("fullattn_forward", x, *keys, scale, gamma, out)
    return out


def _forward_with_residual(
    x: Tensor, column_key: Tensor, row_key: Tensor, gamma: Tensor, scale: float
) -> Tensor:
    out = _forward(x, column_key, row_key, scale, gamma.float().reshape(1))
    return out.to(torch.promote_types(x.dtype, gamma.dtype))


def _backward(
    grad: Tensor, x: Tensor, column_key: Tensor, row_key: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    keys = column_key.float().mT.contiguous(), row_key.float().mT.contiguous()
    source, upper = x.float(), grad.float()
    grad_x = torch.empty_like(source)
    found = [torch.empty(key.shape) for key in (column_key, row_key)]
    _call("fullattn_backward", source, *keys, scale, upper, grad_x, *found)
    grad_column_key = torch.empty_like(column_key).copy_(found[0])
    grad_row_key = torch.empty_like(row_key).copy_(found[1])
    return grad_x.to(x.dtype), grad_column_key, grad_row_key


def _workspace(shape: tuple[Size, ...], setting: Setting) -> Workspace:
    x = prod(shape) * setting.size
    casts = setting.half * prod(shape) * 4
    forward, backward = kernel_workspace(shape, setting.threads)
    peak = (1 - setting.half) * x + 2 * casts + forward
    return Workspace(
        flops=flops.axial_channel_attention(shape),
        backward_flops=flops.axial_channel_attention_backward(shape, shape),
        output=x,
        inference=peak,
        saved=0,
        forward=peak,
        backward=2 * x + 3 * casts + backward,
        backward_shared=x + 3 * casts + backward,
    )


def kernel_workspace(shape: tuple[Size, ...], threads: Size) -> tuple[Size, Size]:
    """Compute the bytes that `native.c` allocates for (B, C, H, W), in forward and in backward.

    The keys; in each thread 16 columns at a time with their result and a block of the map; backward
    also the columns' gradient, three more blocks, and a partial sum of the keys' gradients for each
    image and thread.
    """
    batch, channels, height, width = shape
    row = -(-channels // 32) * 32 + 16
    columns = minimum(16, width, -(-batch * width // threads))
    keys = row * (height + width)
    block = maximum(columns * height, width)
    return (
        4 * (batch * keys + threads * row * (2 * block + 32)),
        4 * ((2 * batch + threads) * keys + threads * row * (3 * block + 2 * (32 + 64))),
    )


_attend = operators.register(
    "attend_native",
    ("x", "column_key", "row_key"),
    forward=_forward,
    forward_flops=flops.axial_channel_attention,
    backward=_backward,
    backward_flops=flops.axial_channel_attention_backward,
    definition=reference.attend_columns_and_rows,
    empty_result=lambda x, column_key, row_key, scale: torch.empty_like(x),
)
_attend_with_residual = operators.register(
    "attend_native_with_residual",
    ("x", "column_key", "row_key", "gamma"),
    forward=_forward_with_residual,
    forward_flops=flops.axial_channel_attention,
    empty_result=lambda x, column_key, row_key, gamma, scale: torch.empty_like(
        x, dtype=torch.promote_types(x.dtype, gamma.dtype)
    ),
)


def axial_channel_attention(
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    scale: float = 1.0,
    gamma: Tensor | None = None,
) -> Tensor:
    """Compute columns + rows, or with gamma, and without a gradient, gamma · (columns + rows) + x.

    Args:
        x: feature map, (B, C, H, W), of any strides.
        column_key: (B, C, H).
        row_key: (B, C, W).
        scale: factor on the scores, of either sign.
        gamma: one number, or None.

    Returns:
        (B, C, H, W) in x's memory layout.
    """
    inputs = (x, column_key, row_key) if gamma is None else (x, column_key, row_key, gamma)
    operator = _attend if gamma is None else _attend_with_residual
    result: Tensor = operator(*inputs, scale)
    return result


BACKEND = Backend(
    name="native",
    summary="C kernel, ready or compiled on first use: both branches of FullyAttentional",
    operations={"axial channel attention": axial_channel_attention},
    operation_workspaces={"axial channel attention": _workspace},
    own_operators=True,
    adds_residual="inference",
    devices=frozenset({"cpu"}),
    dtypes={"*": FLOATING - {torch.float64}},
    unavailable=_unavailable,
)
