"""Whether PyTorch runs the operators, or records, exports or transforms them.

`torch.compile` and `torch.export` run the code with symbolic sizes, `torch.jit.trace` (and
`torch.onnx.export` through it) with sizes that are tensors. A program that leaves this process
holds PyTorch's own operators alone, and so does a computation that is differentiated in a way for
which only those have a formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fullattn._versions import is_exporting, is_known_size, is_known_true

__all__ = [
    "inverse_root",
    "is_exported",
    "is_jit_traced",
    "is_symbolic",
    "is_transformed",
    "plain_shape",
    "statically_true",
    "with_plain_sizes",
]


def is_jit_traced() -> bool:
    """Return whether torch.jit.trace, or torch.onnx.export through it, records the operators."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_exported() -> bool:
    """Return whether the program that is recorded can be loaded without this package."""
    return is_exporting() or is_jit_traced()


def is_transformed() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def with_plain_sizes() -> AbstractContextManager[None]:
    """Let sizes be integers in the block, also while torch.jit.trace would record them."""
    return _without_recording() if is_jit_traced() else nullcontext()


@contextmanager
def _without_recording() -> Iterator[None]:
    functions: Any = torch._C  # its stubs lack the setter
    state = functions._get_tracing_state()
    functions._set_tracing_state(None)
    try:
        yield
    finally:
        functions._set_tracing_state(state)


def plain_shape(x: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor, in integers also while torch.jit.trace would record it."""
    if not is_jit_traced():
        return x.shape
    with with_plain_sizes():
        return tuple(x.shape)


def statically_true(condition: Any) -> bool:
    """Whether a condition on sizes holds, without making it a condition of a traced program.

    While PyTorch traces with symbolic sizes, a Python branch on a size becomes a guard, with which
    an export with dynamic sizes fails. A condition that may not hold for some size is then False.
    """
    if torch.compiler.is_compiling():
        return is_known_true(condition)
    # While torch.jit.trace records sizes, a comparison is a tensor.
    return not isinstance(condition, Tensor) and bool(condition)


def is_symbolic(size: Any) -> bool:
    """Whether a size is symbolic in a program that is being traced."""
    if torch.compiler.is_compiling():
        return not is_known_size(size)
    return isinstance(size, Tensor)


def inverse_root(size: Any, like: Tensor) -> Any:
    """Return 1/√size, where torch.jit.trace records sizes a tensor of the dtype of `like`."""
    return (size.to(like.dtype) if isinstance(size, Tensor) else size) ** -0.5
