"""The oldest versions that the package runs on, and what differs between those of PyTorch."""

from __future__ import annotations

import contextlib
import sys
import threading
from contextlib import AbstractContextManager
from typing import Any

if sys.version_info < (3, 10):  # noqa: UP036 - what pip refuses can still be on the path
    raise ImportError("fullattn needs Python 3.10 or later")

import torch

__all__ = [
    "VERSION",
    "allows_tf32",
    "eager",
    "is_exporting",
    "is_known_size",
    "is_known_true",
    "local",
    "reset_compiler",
]

VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if VERSION < (2, 4):
    raise ImportError(f"fullattn needs PyTorch 2.4 or later, found {torch.__version__}")

# Dynamo of PyTorch 2.4 and 2.5 does not see the attributes of a thread-local object: what compiled
# code reads is then one for all threads.
local: Any = threading.local if VERSION >= (2, 6) else object

# What Dynamo cannot ask of a symbolic size before 2.8 counts as not known.
_ASKS_ABOUT_SIZES = VERSION >= (2, 8)


def is_exporting() -> bool:
    """Whether torch.export runs: what it traces has to hold PyTorch's own operators alone.

    PyTorch 2.4 to 2.6 cannot tell an export from a compilation: the same is then done for both,
    which is right for both and slower than need be for a compilation. Dynamo of 2.7 to 2.12 answers
    yes for both, but sees the mark itself.
    """
    if VERSION >= (2, 13):
        return torch.compiler.is_exporting()
    if VERSION >= (2, 7):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_compiling()


def is_known_true(condition: Any) -> bool:
    """Whether a condition on sizes holds for every size, while Dynamo traces."""
    if _ASKS_ABOUT_SIZES:
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition is True  # a condition on a symbolic size is no bool


def is_known_size(size: Any) -> bool:
    """Whether a size is not symbolic, while Dynamo traces."""
    if _ASKS_ABOUT_SIZES:
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return has_static_value(size)
    return (size > 2) is True or (size <= 2) is True


def eager() -> AbstractContextManager[Any]:
    """Run what was compiled without its compiled code, in the block."""
    if "torch._dynamo" not in sys.modules:  # otherwise nothing has been compiled
        return contextlib.nullcontext()
    if hasattr(torch.compiler, "set_stance"):  # from 2.6
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    patch: Any = torch._dynamo.config.patch
    return patch(disable=True)  # type: ignore[no-any-return]


def allows_tf32() -> bool:
    """Whether float32 products on a GPU may run in TF32."""
    switches: Any = torch.backends  # its stubs lack the setting
    try:
        precision = switches.cuda.matmul.fp32_precision  # from 2.9
    except AttributeError:
        return bool(switches.cuda.matmul.allow_tf32)
    return bool((switches.fp32_precision if precision == "none" else precision) == "tf32")


def reset_compiler() -> None:
    """Have torch.compile compile again, where anything was compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
