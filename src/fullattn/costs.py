"""Compute the costs of a layer by formula: FLOPs, parameters, similarity maps and peak memory.

Nothing is run: the layer may be on the meta device, and the feature map may exceed the memory.

FLOPs are 2 per multiply-add of matrix products and convolutions, as in
`torch.utils.flop_counter.FlopCounterMode`. The two agree, except that the counter omits a product
over an axis of length 1, which einsum computes element by element. For x of (B, C, H, W):

    FullyAttentional   8·B·C²·HW          attention: two products in each of two branches
                       2·B·C²·(H + W)     the two Linears
                       18·B·C²·HW         the projection
    ChannelNonLocal    4·B·C²·HW
    SpatialNonLocal    2·B·HW·H'W'·(D+E)  D channels of a query, E of a value, after subsampling
                       2·B·C·N·HW         each of its 1x1 convolutions, from or to N channels

Backward, with a gradient for x, costs twice the forward if the map is saved, and half the
attention's forward more if a fused backend recomputes the scores. `triton` recomputes more than
the scores, which is not counted, as PyTorch does not for its own fused kernels.

Memory is the peak of all tensors besides x, the parameters and the gradient of the output: the
result, copies, maps, buffers, and in training the tensors saved for backward and the gradients of x
and the parameters. The formulas assume a contiguous x, a normalisation that saves its input and an
activation that saves its result, as BatchNorm2d and ReLU do. On a CPU in float32 they are within
10 % of the allocations that PyTorch reports. Not counted are workspaces of BLAS, of convolutions in
half precision and of `sdpa` in half precision on processors with matrix units (AMX), memory that
the allocator does not return, and PyTorch's own data structures. For other devices the formulas are
the same; the workspaces of their libraries are not counted.

Example:
    >>> import torch, fullattn
    >>> from fullattn import costs
    >>> layer = fullattn.FullyAttentional(512, project=False, device="meta")
    >>> cost = costs.cost(layer, (1, 512, 97, 97), backend="reference")
    >>> f"{cost.flops / 1e9:.1f} GFLOP, and {cost.backward_flops / 1e9:.1f} backward"
    '19.8 GFLOP, and 39.7 backward'
    >>> cost.parameters, cost.map_numel  # (97 + 97) maps of 512 x 512
    (525313, 50855936)
    >>> cost.map_bytes / cost.inference_bytes > 0.4
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import nn

from fullattn.attention import AttentionInputs, Backend, ScoreFunction, dispatch
from fullattn.attention.backend import FLOATING, Setting, Workspace
from fullattn.attention.sizes import Size, maximum, minimum
from fullattn.counters import register_counters
from fullattn.layers import LAYERS, AttentionLayer, _checks
from fullattn.layers.protocol import Work

__all__ = [
    "Cost",
    "Figures",
    "cost",
    "counted_flops",
    "figures",
    "inputs_of",
    "register_counters",
]


Shape: TypeAlias = tuple[Size, Size, Size, Size]


@dataclass(frozen=True)
class Cost:
    """Costs of one call of a layer.

    Attributes:
        backend: name of the backend that the figures are for.
        parameters: elements in the layer's parameters.
        flops: of a forward pass; 2 for each multiplication with an addition.
        backward_flops: of the backward pass, with a gradient for x, the forward not included.
        map_numel: elements in all similarity maps of the batch, built or not.
        map_bytes: bytes of those maps if they are built.
        inference_bytes: peak memory of a forward pass without gradients, besides x and the
            parameters.
        training_bytes: the same of a forward and backward pass, with a gradient for x.
    """

    backend: str
    parameters: int
    flops: int
    backward_flops: int
    map_numel: int
    map_bytes: int
    inference_bytes: int
    training_bytes: int


@dataclass(frozen=True)
class Figures:
    """The figures of a `Cost` that depend on the shape; integers or symbols."""

    flops: Size
    backward_flops: Size
    map_numel: Size
    map_bytes: Size
    inference_bytes: Size
    training_bytes: Size


def cost(
    layer: nn.Module,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Cost:
    """Compute the costs of a layer on a feature map by formula.

    Args:
        layer: a registered layer, on any device; its options are read from it.
        shape: of the feature map, (B, C, H, W).
        dtype: of the feature map and the layer.
        backend: name of the backend; None for the automatic choice.
        device: device that the layer runs on.

    Returns:
        The costs.

    Raises:
        BackendError: the named backend cannot run this.
        TypeError: not a registered layer, or not a real floating-point dtype.
        ValueError: an unsupported shape, an unknown backend, or a layer with `mix_images`, for
            which there is no formula.

    Example:
        >>> from fullattn import ChannelNonLocal
        >>> cost(ChannelNonLocal(512), (1, 512, 97, 97)).flops
        9866051584
    """
    if not isinstance(layer, AttentionLayer):
        names = ", ".join(each.__name__ for each in LAYERS.values())
        raise TypeError(f"expected one of {names}, got {type(layer).__name__}")
    if dtype not in FLOATING:
        raise TypeError(f"expected a real floating-point dtype, got {dtype}")
    sizes = _checked(layer, shape)
    setting = Setting(dtype.itemsize, torch.device(device).type, torch.get_num_threads())
    inputs = inputs_of(layer, sizes, dtype, setting.device)
    if backend is None:
        chosen = dispatch.choose(inputs, layer.backend)
    else:
        with dispatch.backend(backend):
            chosen = dispatch.choose(inputs)
    found = figures(layer, sizes, setting, chosen)
    return Cost(
        backend=chosen.name,
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        **vars(found),
    )


def _checked(layer: AttentionLayer, shape: Sequence[int]) -> tuple[int, int, int, int]:
    if len(shape) != 4:
        raise ValueError(f"expected a shape (B, {layer.channels}, H, W), got {tuple(shape)}")
    sizes = [
        _checks.positive(size, f"{axis} of shape {tuple(shape)}")
        for axis, size in zip("BCHW", shape, strict=True)
    ]
    if sizes[1] != layer.channels:
        raise ValueError(f"expected {layer.channels} channels, got shape {tuple(shape)}")
    layer.check_size(tuple(sizes))
    return sizes[0], sizes[1], sizes[2], sizes[3]


def inputs_of(
    layer: AttentionLayer, shape: Shape, dtype: torch.dtype, device: str
) -> AttentionInputs:
    """Return `AttentionInputs.of` of a layer's call, without the call.

    Args:
        layer: the layer, on any device.
        shape: of the feature map, (B, C, H, W); integers or symbols.
        dtype: of the feature map.
        device: device type.
    """
    branches = layer.work((1, *shape[1:]), dtype.itemsize).branches
    sizes = [(*each.query[1:3], each.key[2], each.query[3]) for each in branches]
    operation, score = layer.operation, branches[0].score
    return AttentionInputs.of_sizes(operation.name, score, device, dtype, operation.sliced, *sizes)


def figures(layer: AttentionLayer, shape: Shape, setting: Setting, backend: Backend) -> Figures:
    """Compute the costs of a layer on a backend.

    Args:
        layer: the layer, on any device.
        shape: of the feature map, (B, C, H, W); integers or symbols.
        setting: dtype, device and threads.
        backend: a backend that can run the layer.
    """
    work = layer.work(shape, setting.size)
    softmax = work.branches[0].score is ScoreFunction.SOFTMAX
    whole = backend.operation_workspaces.get(layer.operation.name) if softmax else None
    if whole is not None:
        runs = [whole(shape, setting)]
    elif backend.workspace is not None:
        runs = [backend.workspace(branch, setting) for branch in work.branches]
    else:
        raise ValueError(f"backend {backend.name!r} declares no workspace")
    own = work.flops + sum(
        part.flops for part in (work.output, work.projection) if part is not None
    )
    map_numel = sum(branch.map_numel for branch in work.branches)
    x = prod(shape) * setting.size
    return Figures(
        flops=own + sum(run.flops for run in runs),
        backward_flops=2 * own + sum(run.backward_flops for run in runs),
        map_numel=map_numel,
        map_bytes=map_numel * setting.work_size,
        inference_bytes=maximum(*_inference(work, x, runs)),
        training_bytes=maximum(
            *_training(work, x, runs, whole is not None and backend.adds_residual == "always")
        ),
    )


def _inference(work: Work, x: Size, runs: list[Workspace]) -> Iterator[Size]:
    """Yield the bytes in use at each step of a forward pass without gradients; x of one map."""
    yield work.making
    done: Size = 0
    for run in runs:
        yield work.inputs + done + run.inference
        done = done + run.output
    if len(runs) > 1:
        yield work.inputs + done + x  # their sum
    if work.output is not None:
        yield done + 2 * x
    elif len(work.branches) == 1 and not work.branches[0].contiguous:
        yield done + x  # in another layout the attended values are not overwritten
    if work.projection is not None:
        yield 2 * x + work.projection.workspace
        # The projection's input, and the input and result of one of its later modules.
        yield minimum(3, 2 + work.projection.later) * x


def _training(work: Work, x: Size, runs: list[Workspace], adds_residual: bool) -> Iterator[Size]:
    """Yield the bytes in use at each step of a training pass; x of one map."""
    always = work.kept
    inputs = work.inputs
    kept = always + inputs
    for run in runs:
        yield kept + run.forward
        kept = kept + run.kept
    # A backend that saves copies does not hold its inputs.
    inputs = inputs * runs[0].keeps_inputs
    kept = always + inputs + sum(run.kept for run in runs)
    outputs = sum(run.output for run in runs if not run.keeps_output)
    if len(runs) > 1:
        yield kept + outputs + x  # their sum
    # The attended values are held until gamma is applied; a saved output is counted already.
    single = runs[0].output if len(runs) == 1 else x
    counted = len(runs) == 1 and runs[0].keeps_output
    attended = 0 if adds_residual or counted else single
    result = x
    weights: Size = 0  # gradients of the parameters after the attention
    if work.output is not None:
        normalised = x if work.output.normalised else 0
        weights = work.output.weights
        yield kept + attended + 2 * x + normalised  # output, normalised, sum with x
        yield kept + attended + x + 2 * normalised  # normalisation, backward
        yield kept + attended + result + normalised + work.output_inputs + weights
    grad_sum: Size = (
        0  # the gradient of the sum with x; without a projection it is that of the output
    )
    if work.projection is not None:
        part = work.projection
        weights, grad_sum = part.weights, x
        held = kept + attended + x  # the projection saves its input
        yield held + maximum((1 + part.later) * x, x + part.workspace)
        convolved = x if part.normalised else 0
        yield held + result + convolved + part.later * x
        yield (
            held + result + (x if part.later else 0) + grad_sum + weights + part.backward_workspace
        )
    held = result + grad_sum + weights
    if work.output is None and not adds_residual:
        yield kept + attended + held + 2 * x  # gradients of the attended values and of gamma
    for run in reversed(runs):
        # The gradient of the attended values is held until all branches have used it; if a backend
        # adds the residual, it is the gradient of the output.
        last = run is runs[0]
        if last and not adds_residual:
            alone = len(runs) == 1 and work.output is None
            peak = run.backward + (run.contiguous_grad if alone else 0)
        else:
            peak = run.backward_shared + (0 if adds_residual else x)
        yield kept - run.saved + held + peak
        kept = kept - run.kept
        if work.projection is None:  # otherwise added to the gradient of the sum, in place
            held = held + work.branch_gradient
    yield always + held + work.gradients


def counted_flops(run: Callable[[], object]) -> int:
    """Count the FLOPs of a call, on real or meta tensors, with PyTorch's FlopCounterMode."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes time

    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())
