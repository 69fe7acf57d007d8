"""Why one row has no figure; the run goes on without it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fullattn._cli.errors import describe
from fullattn.attention import BackendError

__all__ = ["Failure"]


@dataclass(frozen=True)
class Failure:
    """A reason.

    Attributes:
        kind: two or three words for the table.
        reason: one sentence for the notes under it.
    """

    kind: str
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Read an exception that a contender raised."""
        reason = describe(error)
        if isinstance(error, BackendError):
            return cls("cannot run", str(error))
        # PyTorch's CPU allocator raises a plain RuntimeError.
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if out_of_memory or "can't allocate memory" in str(error):
            return cls("out of memory", reason)
        return cls("failed", reason)

    @classmethod
    def too_slow(cls, seconds: float | None, limit: float) -> Failure:
        """One call takes longer than the limit: by forecast, or None where it was tried."""
        took = (
            f"one call did not end within {limit:g} s"
            if seconds is None
            else f"one call would take about {seconds:.0f} s by its FLOPs, the limit is {limit:g} s"
        )
        return cls("too slow", f"{took} (--limit)")

    @classmethod
    def no_time_left(cls, budget: float) -> Failure:
        """The run has used up its time before this row."""
        return cls(
            "no time left", f"not begun within its share of the run's {budget:g} s (--budget)"
        )
