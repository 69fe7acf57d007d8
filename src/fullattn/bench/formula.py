"""What is known of a contender without running it: parameters, FLOPs, sizes of maps."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fullattn import costs
from fullattn._cli.conditions import MEMORY_FORMATS, Conditions
from fullattn._cli.shapes import Shape
from fullattn.attention import BackendError
from fullattn.bench.implementations import OFFICIAL, Contender
from fullattn.bench.results import Formula
from fullattn.layers import LAYERS, FullyAttentional

__all__ = ["formula"]


def formula(
    contender: Contender, module: nn.Module, shape: Shape, conditions: Conditions
) -> Formula:
    """Everything that a row says without measuring.

    Args:
        contender: the row's.
        module: built from it.
        shape: of the input.
        conditions: for dtype and device.

    Returns:
        The figures; None for those that there is no formula for.
    """
    parameters = sum(parameter.numel() for parameter in module.parameters())
    counted = _count_flops(module, shape, conditions)
    if contender.layer not in LAYERS and contender.layer != OFFICIAL:
        return Formula(parameters, counted_flops=counted)
    backend = contender.backend
    if contender.layer == OFFICIAL:
        # The same sums as the layer whose form it is; what it keeps in memory has no formula.
        module, backend = FullyAttentional(shape.channels, project=conditions.project), "reference"
    dtype = getattr(torch, conditions.dtype)
    device = torch.device(conditions.device).type
    try:
        cost = costs.cost(module, shape, dtype=dtype, backend=backend, device=device)
    except BackendError:
        return Formula(parameters, counted_flops=counted)
    ours = contender.layer != OFFICIAL
    return Formula(
        parameters=parameters,
        flops=cost.flops,
        counted_flops=counted,
        map_numel=cost.map_numel,
        map_bytes=cost.map_bytes,
        inference_bytes=cost.inference_bytes if ours else None,
        training_bytes=cost.training_bytes if ours else None,
    )


def _count_flops(module: nn.Module, shape: Shape, conditions: Conditions) -> int | None:
    """FLOPs of one forward by PyTorch's counter, on tensors without data; None if that fails."""
    module.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            x = torch.empty(
                shape,
                dtype=getattr(torch, conditions.dtype),
                device=conditions.device,
                memory_format=MEMORY_FORMATS[conditions.memory_format],
            )
            with torch.no_grad():
                module(x)
    except Exception:
        # A user's module may look at its data, which a tensor without data cannot show.
        return None
    return int(counter.get_total_flops())
