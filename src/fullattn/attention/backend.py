"""Operations, calls and backends, with the limits and the workspace of a backend as data."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fullattn._versions import is_exporting
from fullattn.attention.sizes import Size, less, maximum
from fullattn.attention.tracing import statically_true
from fullattn.reshape import Cut

__all__ = [
    "AttentionCall",
    "AttentionInputs",
    "Backend",
    "Branch",
    "BranchSizes",
    "Operation",
    "ScoreFunction",
    "Setting",
    "Workspace",
    "branches_of",
    "described",
    "work_dtype",
]

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores and softmax: at least float32, since float16 ends at 65504."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class ScoreFunction(enum.Enum):
    """How the scores of a query become the weights of its keys."""

    SOFTMAX = "softmax attention"
    DOT_PRODUCT = "dot-product attention without softmax"
    CONCATENATION = "concatenation attention without softmax"


class Branch(NamedTuple):
    """One attention over feature maps: query, key and value before they are cut into tokens.

    Attributes:
        cut: how the feature maps are cut into slices of tokens.
        query: feature map.
        key: feature map that is cut as the query is, or tokens (B, M, D) that all slices share.
        value: feature map that is cut as the query is.
    """

    cut: Cut
    query: Tensor
    key: Tensor
    value: Tensor

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, S, N, D), key (B, S or 1, M, D) and value (B, S, M, E)."""
        cut, given, key, value = self
        query = cut(given)
        key = key.unsqueeze(1) if key.dim() == 3 else query if key is given else cut(key)
        return query, key, query if value is given else cut(value)

    def put_back(self, attended: Tensor) -> Tensor:
        """Put attended values (B, S, N, E) back into a feature map."""
        return self.cut.inverse(attended, self.query.shape[2], self.query.shape[3])


@dataclass(frozen=True)
class Operation:
    """An attention over feature maps: its definition, and the same as branches of tokens.

    Attributes:
        name: for backends that run the whole operation in one pass.
        similarity: the definition of the maps: from (*tensors, scale) a tensor, or a named tuple
            with one for each branch. `score` is passed too, if it is not the softmax.
        attended: the definition of the result, a feature map; called as `similarity` is.
        cuts: of each branch, how its feature maps are cut.
        branches: for backends that fuse: from (*tensors) query, key and value of each branch, as in
            `Branch`; the attended values of the branches add up to `attended`.
        sliced: whether there are several slices, which must be copied before a map is built.
    """

    name: str
    cuts: tuple[Cut, ...]
    similarity: Callable[..., Any]
    attended: Callable[..., Tensor]
    branches: Callable[..., tuple[tuple[Tensor, Tensor, Tensor], ...]]

    sliced: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sliced", any(cut.slices for cut in self.cuts))


class AttentionCall(NamedTuple):
    """An operation and its arguments.

    Attributes:
        operation: the operation.
        tensors: its tensors.
        scale: factor on the scores, of either sign.
        score: how scores become weights.
    """

    operation: Operation
    tensors: tuple[Tensor, ...]
    scale: float = 1.0
    score: ScoreFunction = ScoreFunction.SOFTMAX

    @property
    def branches(self) -> list[Branch]:
        """The branches of the operation, with the tensors of this call."""
        return branches_of(self)


def branches_of(call: AttentionCall) -> list[Branch]:
    """Return `call.branches`, which torch.compile of PyTorch 2.4 does not find on a named tuple."""
    cuts, compared = call.operation.cuts, call.operation.branches(*call.tensors)
    return [Branch(cut, *each) for cut, each in zip(cuts, compared, strict=True)]


class AttentionInputs(NamedTuple):
    """The properties of a call that the choice of a backend depends on.

    Attributes:
        operation: its name; "" for slices of tokens.
        score: how scores become weights.
        device: device type, such as "cpu" or "cuda".
        dtype: dtype in which the inputs arrive, after autocast.
        sliced: as of the operation.
        map_numel: elements in all similarity maps of one image.
        token_numel: elements in the query and key tokens that those maps relate, per image.
        features: D, the length of a query (the longest one, where branches differ).
    """

    operation: str
    score: ScoreFunction
    device: str
    dtype: torch.dtype
    sliced: bool
    map_numel: int
    token_numel: int
    features: int

    @classmethod
    def of(cls, call: AttentionCall) -> AttentionInputs:
        """Describe a call."""
        operation, (x, *_), _, score = call
        sizes = []
        for cut, (query, key, _) in zip(
            operation.cuts, operation.branches(*call.tensors), strict=True
        ):
            slices, tokens, features = cut.sizes(query.shape)
            memory = key.shape[1] if key.dim() == 3 else cut.sizes(key.shape)[1]
            sizes.append((slices, tokens, memory, features))
        return cls.of_sizes(operation.name, score, x.device.type, x.dtype, operation.sliced, *sizes)

    @classmethod
    def of_sizes(
        cls,
        operation: str,
        score: ScoreFunction,
        device: str,
        dtype: torch.dtype,
        sliced: bool,
        *branches: tuple[Any, Any, Any, Any],
    ) -> AttentionInputs:
        """Describe branches by their sizes (S, N, M, D): integers, or symbols of either kind."""
        map_numel: Any = 0
        token_numel: Any = 0
        for slices, tokens, memory, features in branches:
            map_numel = map_numel + slices * tokens * memory
            token_numel = token_numel + slices * (tokens + memory) * features
        longest: Any = maximum(*[features for *_, features in branches])
        return cls(operation, score, device, dtype, sliced, map_numel, token_numel, longest)


@dataclass(frozen=True)
class Setting:
    """Dtype, device and threads for a workspace; sizes are integers or symbols.

    Attributes:
        size: bytes of an element of the feature map.
        device: device type.
        threads: of PyTorch within an operator.
    """

    size: Size
    device: str
    threads: Size

    @property
    def half(self) -> Size:
        """1 in half precision, 0 otherwise."""
        return less(self.size, 4)

    @property
    def work_size(self) -> Size:
        """Bytes of an element where scores and softmax are computed: float32 at least."""
        return maximum(self.size, 4)


@dataclass(frozen=True)
class BranchSizes:
    """The sizes of one branch, for its costs; integers or symbols.

    Attributes:
        cut: how the feature maps are cut.
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        value: (B, S or 1, M, E).
        score: how scores become weights.
        key_is_query: whether the two are one tensor.
        value_is_query: whether the two are one tensor.
        scale: factor on the scores.
    """

    cut: Cut
    query: tuple[Size, Size, Size, Size]
    key: tuple[Size, Size, Size, Size]
    value: tuple[Size, Size, Size, Size]
    score: ScoreFunction = ScoreFunction.SOFTMAX
    key_is_query: bool = False
    value_is_query: bool = False
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        cut: Cut,
        query: tuple[Size, Size, Size, Size],
        key: tuple[Size, Size, Size, Size] | None = None,
        value: tuple[Size, Size, Size, Size] | None = None,
        *,
        shared_key: bool = False,
        score: ScoreFunction = ScoreFunction.SOFTMAX,
        scale: float = 1.0,
    ) -> BranchSizes:
        """Compute the sizes from the shapes of feature maps (B, C, H, W) before the cut.

        Args:
            cut: how the feature maps are cut.
            query: shape of the query.
            key: shape of the key; None if the key is the query, or shared and as long.
            value: shape of the value; None if the value is the query.
            shared_key: whether all slices share one key.
            score: how scores become weights.
            scale: factor on the scores.
        """
        queries, keys, values = (
            (shape[0], *cut.sizes(shape)) for shape in (query, key or query, value or query)
        )
        if shared_key:
            keys = (keys[0], 1, *keys[2:])
        key_is_query = key is None and not shared_key
        return cls(cut, queries, keys, values, score, key_is_query, value is None, scale)

    @property
    def contiguous(self) -> bool:
        """Whether the slices of a contiguous feature map are contiguous."""
        return self.cut.slices + self.cut.tokens + self.cut.features == "chw"

    @property
    def in_place(self) -> bool:
        """Whether BLAS can read every slice of a contiguous feature map where it lies."""
        return "w" not in self.cut.slices

    @property
    def out(self) -> tuple[Size, Size, Size, Size]:
        """Shape of the result, (B, S, N, E)."""
        return (*self.query[:3], self.value[3])

    @property
    def map_numel(self) -> Size:
        """Elements in the similarity maps of all images."""
        return self.query[0] * self.query[1] * self.query[2] * self.key[2]


@dataclass(frozen=True)
class Workspace:
    """FLOPs of an attention, and its memory in bytes over its inputs; integers or symbols.

    Attributes:
        flops: forward; 2 for each multiplication with an addition.
        backward_flops: backward.
        output: held as long as the result.
        inference: peak of a forward pass without gradients, the output included.
        saved: saved for backward besides inputs and output.
        forward: peak of a forward pass with gradients, `saved` and output included.
        backward: peak of the backward pass, `saved`, the gradients of the inputs and that of the
            output included.
        backward_shared: the same without the gradient of the output.
        contiguous_grad: additional peak of backward if that gradient is not contiguous.
        keeps_inputs: whether the inputs are saved for backward, 0 or 1.
        keeps_output: whether the output is saved for backward.
    """

    flops: Size
    backward_flops: Size
    output: Size
    inference: Size
    saved: Size
    forward: Size
    backward: Size
    backward_shared: Size
    contiguous_grad: Size = 0
    keeps_inputs: Size = 1
    keeps_output: bool = False

    @property
    def kept(self) -> Size:
        """Bytes saved for backward besides the inputs."""
        return self.saved + (self.output if self.keeps_output else 0)


def _exceeds(size: int, most: int) -> bool:
    # torch.compile may guard on a limit and trace again beyond it; an exported program may not.
    return statically_true(size > most) if is_exporting() else size > most


def _always_available() -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Backend:
    """A way to run attention, with its limits and its workspace declared as data.

    Attributes:
        name: for `fullattn.backend(...)`, a layer's `backend=` and FULLATTN_BACKEND.
        summary: one line for `fullattn info`.
        attend: for each score function the function of tokens, as `fullattn.attention.attend`.
        workspace: FLOPs and memory of `attend`, from a `BranchSizes` and a `Setting`.
        operations: by the name of an operation, a function of its tensors and the scale that runs
            all branches in one pass.
        operation_workspaces: FLOPs and memory of those, from (B, C, H, W) and a `Setting`.
        builds_map: whether the backend runs an operation's definition, with the map in memory.
        own_operators: whether the backend calls custom operators of this package. A program with
            them that `torch.export` has written cannot be loaded without the package.
        adds_residual: when the functions in `operations` take a gamma as last argument and return
            gamma · attended + x: never, in inference (without a gradient), or always.
        most_features: the largest supported D; None for any.
        devices: supported device types; None for all.
        dtypes: supported input dtypes, per device type; "*" for the device types not named.
        unavailable: returns why the backend cannot run on this machine, or None. Called after all
            other limits were checked, because the first call may be expensive.
    """

    name: str
    summary: str
    attend: Mapping[ScoreFunction, Callable[..., Tensor]] = field(default_factory=dict)
    workspace: Callable[[BranchSizes, Setting], Workspace] | None = None
    operations: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    operation_workspaces: Mapping[str, Callable[[tuple[Size, ...], Setting], Workspace]] = field(
        default_factory=dict
    )
    builds_map: bool = False
    own_operators: bool = False
    adds_residual: Literal["never", "inference", "always"] = "never"
    most_features: int | None = None
    devices: frozenset[str] | None = None
    dtypes: Mapping[str, frozenset[torch.dtype]] = field(default_factory=lambda: {"*": FLOATING})
    unavailable: Callable[[], str | None] = _always_available

    def reasons_against(self, inputs: AttentionInputs) -> list[str]:
        """List the limits of this backend that the inputs exceed, as sentences."""
        reasons = []
        whole = inputs.operation in self.operations and inputs.score is ScoreFunction.SOFTMAX
        if not whole and inputs.score not in self.attend:
            runs = ", ".join([*self.operations, *(score.value for score in self.attend)])
            reasons.append(f"computes {runs}, not {described(inputs)}")
        if self.devices is not None and inputs.device not in self.devices:
            reasons.append(f"runs on {', '.join(sorted(self.devices))}, not on {inputs.device}")
        dtypes = self.dtypes.get(inputs.device, self.dtypes.get("*", ()))
        if inputs.dtype not in dtypes and not (self.devices and reasons):
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            name = str(inputs.dtype).removeprefix("torch.")
            reasons.append(f"takes {names} on {inputs.device}, not {name}")
        if self.most_features is not None and _exceeds(inputs.features, self.most_features):
            reasons.append(f"takes up to {self.most_features} features, not {inputs.features}")
        if not reasons and (missing := self.unavailable()) is not None:
            reasons.append(missing)
        return reasons


def described(inputs: AttentionInputs) -> str:
    """Name the operation, or the score function if it is not the softmax, for messages."""
    if not inputs.operation or inputs.score is not ScoreFunction.SOFTMAX:
        return inputs.score.value
    return inputs.operation
