"""What a backend is and what it is asked to do: data that dispatch, errors and docs share."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Backend", "Kind", "Problem", "is_free", "known"]

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def known(condition: bool) -> bool:
    """Whether a condition on sizes holds, without making it a condition of a traced program.

    While PyTorch traces with symbolic sizes, a Python branch on a size becomes a guard, and an
    export with dynamic sizes fails. A condition that does not hold for every size is then False.
    """
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition


def is_free(size: int) -> bool:
    """Whether a size is a symbol, which stands for many sizes in a traced program."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return not has_static_value(size)
    return False


class Kind(enum.Enum):
    """The forms of attention that the layers ask for."""

    SOFTMAX = "softmax attention"
    COLUMNS_AND_ROWS = "softmax attention over columns plus rows of one feature map"
    DOT_PRODUCT = "dot-product attention without softmax"
    CONCATENATION = "concatenation attention without softmax"


@dataclass(frozen=True)
class Problem:
    """One call of the primitive, described by everything that decides which backend can run it.

    Attributes:
        kind: the form of attention.
        device: device type, such as "cpu" or "cuda".
        dtype: dtype in which the inputs arrive, after autocast.
        map_numbers: numbers in all similarity maps of one image.
        tensor_numbers: numbers in the query and key tokens that those maps relate, per image.
        features: D, the length of a query (the longer one, where two branches differ).
    """

    kind: Kind
    device: str
    dtype: torch.dtype
    map_numbers: int
    tensor_numbers: int
    features: int

    @classmethod
    def of(cls, kind: Kind, query: Tensor, key: Tensor) -> Problem:
        """Describe attend(query, key, ...) for query (B, S, N, D) and key (B, S or 1, M, D)."""
        slices, tokens, features = query.shape[1:]
        return cls(
            kind=kind,
            device=query.device.type,
            dtype=query.dtype,
            map_numbers=slices * tokens * key.shape[-2],
            tensor_numbers=slices * (tokens + key.shape[-2]) * features,
            features=features,
        )

    @classmethod
    def of_columns_and_rows(cls, x: Tensor) -> Problem:
        """Describe the two branches of FullyAttentional on a feature map x (B, C, H, W)."""
        channels, height, width = x.shape[1:]
        return cls(
            kind=Kind.COLUMNS_AND_ROWS,
            device=x.device.type,
            dtype=x.dtype,
            map_numbers=(height + width) * channels * channels,
            tensor_numbers=4 * channels * height * width,
            features=max(height, width),
        )


def _exceeds(size: int, most: int) -> bool:
    # torch.compile may guard on a limit and trace again beyond it; an exported program may not.
    return known(size > most) if torch.compiler.is_exporting() else size > most


def _always_available() -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Backend:
    """A way to run attention, with its limits declared as data.

    Attributes:
        name: what `fullattn.backend(...)`, a layer's `backend=` and FULLATTN_BACKEND call it.
        summary: one line for `fullattn info`.
        run: the function for each kind of attention. A backend with SOFTMAX but without
            COLUMNS_AND_ROWS runs the two branches one after the other.
        builds_map: whether the whole similarity map is in memory at once.
        own_operators: whether it calls operators of this package, without which a program that
            `torch.export` made of it could not be loaded.
        adds_residual: whether its function for COLUMNS_AND_ROWS takes a gamma as last argument and
            then returns gamma · (columns + rows) + x.
        most_features: the largest D that it takes; None for any.
        devices: device types on which it runs; None for all.
        dtypes: input dtypes, per device type; "*" stands for the device types not named.
        unavailable: returns why it cannot run on this machine at all, or None. Asked only when
            the limits above allow the problem, so that it may be expensive the first time.
    """

    name: str
    summary: str
    run: Mapping[Kind, Callable[..., Tensor]]
    builds_map: bool = False
    own_operators: bool = False
    adds_residual: bool = False
    most_features: int | None = None
    devices: frozenset[str] | None = None
    dtypes: Mapping[str, frozenset[torch.dtype]] = field(default_factory=lambda: {"*": FLOATING})
    unavailable: Callable[[], str | None] = _always_available

    def reasons_against(self, problem: Problem) -> list[str]:
        """Say why this backend cannot run a problem.

        Args:
            problem: what is asked.

        Returns:
            One sentence for each limit that the problem exceeds; empty when it can run.
        """
        reasons = []
        two_branches = problem.kind is Kind.COLUMNS_AND_ROWS and Kind.SOFTMAX in self.run
        if problem.kind not in self.run and not two_branches:
            runs = ", ".join(kind.value for kind in self.run)
            reasons.append(f"runs {runs}, not {problem.kind.value}")
        if self.devices is not None and problem.device not in self.devices:
            reasons.append(f"runs on {', '.join(sorted(self.devices))}, not on {problem.device}")
        dtypes = self.dtypes.get(problem.device, self.dtypes.get("*", frozenset()))
        if problem.dtype not in dtypes and not (self.devices and reasons):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            name = str(problem.dtype).removeprefix("torch.")
            reasons.append(f"takes {names} on {problem.device}, not {name}")
        if self.most_features is not None and _exceeds(problem.features, self.most_features):
            reasons.append(f"takes up to {self.most_features} features, not {problem.features}")
        if not reasons and (missing := self.unavailable()) is not None:
            reasons.append(missing)
        return reasons
