"""What autograd keeps for backward: never a tensor of map size, where a backend fuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.cases import (
    CHANNEL,
    FULLY_ATTENTIONAL,
    SPATIAL,
    SPATIAL_DOT_PRODUCT,
    SPATIAL_GAUSSIAN,
    SPATIAL_SUBSAMPLED,
    SPATIAL_UNPROJECTED,
    Run,
    fuses,
    runs,
)

CASES_WITHOUT_MAP = (
    FULLY_ATTENTIONAL,
    CHANNEL,
    SPATIAL,
    SPATIAL_GAUSSIAN,
    SPATIAL_DOT_PRODUCT,
    SPATIAL_SUBSAMPLED,
    SPATIAL_UNPROJECTED,
)
# Shapes at which every map is many times the size of anything else, in ordinary and in the
# smallest form: one feature a token, which some fused kernels refuse without a word.
SHAPES = {
    FULLY_ATTENTIONAL.name: [(1, 64, 4, 4), (1, 64, 4, 1)],
    CHANNEL.name: [(1, 96, 2, 2), (1, 96, 1, 1)],
}
SPATIAL_SHAPES = [(1, 6, 16, 12), (1, 2, 16, 12)]


def largest_saved_and_smallest_map(run: Run, form: int) -> tuple[int, int]:
    """Numbers in the largest tensor saved for backward, but for parameters, and in a map."""
    shape = SHAPES.get(run.case.name, SPATIAL_SHAPES)[form]
    layer = run.build(shape[1])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(run.device, run.dtype)
    maps = layer.similarity(x)
    smallest_map = min(one.numel() for one in ([maps] if isinstance(maps, Tensor) else maps))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes.append(storage.nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(layer, x.requires_grad_())
    return max(sizes), smallest_map


@runs(cases=CASES_WITHOUT_MAP, only=fuses)
@pytest.mark.parametrize("form", [0, 1])
def test_a_fused_backend_saves_nothing_of_map_size(run: Run, form: int) -> None:
    largest_saved, smallest_map = largest_saved_and_smallest_map(run, form)
    assert 0 < largest_saved < smallest_map / 4


@runs(cases=CASES_WITHOUT_MAP, only=lambda backend: backend.builds_map)
def test_a_backend_that_builds_the_map_saves_it(run: Run) -> None:
    # The measure above would see a map.
    largest_saved, smallest_map = largest_saved_and_smallest_map(run, 0)
    assert largest_saved >= smallest_map


@runs(cases=CASES_WITHOUT_MAP, only=fuses)
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_is_saved_without_a_gradient_to_take(run: Run, grad: bool) -> None:
    layer = run.build(4).requires_grad_(grad)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        run(layer, torch.randn(1, 4, 3, 5).to(run.device, run.dtype))
    assert bool(saved) == grad
