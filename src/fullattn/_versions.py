"""What differs between the versions of PyTorch that the package runs on, from 2.4."""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["eager", "is_exporting", "reset_compiler"]

# PyTorch 2.4 to 2.6 cannot tell an export from a compilation: both then hold PyTorch's own
# operators alone, which is right for both and slower than need be for a compilation.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def eager() -> AbstractContextManager[Any]:
    """Run what was compiled without its compiled code, in the block."""
    if "torch._dynamo" not in sys.modules:  # otherwise nothing has been compiled
        return contextlib.nullcontext()
    if hasattr(torch.compiler, "set_stance"):  # from 2.6
        return torch.compiler.set_stance("force_eager")
    return torch._dynamo.config.patch(disable=True)  # type: ignore[attr-defined, no-any-return]


def reset_compiler() -> None:
    """Have torch.compile compile again, where anything was compiled."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
