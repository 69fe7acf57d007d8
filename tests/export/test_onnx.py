"""The layers in ONNX, exported once with dynamic sizes and run at other sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import fullattn
from helpers.cases import (
    CASES,
    CHANNEL,
    FULLY_ATTENTIONAL,
    SPATIAL,
    SPATIAL_GAUSSIAN,
    Case,
    assert_near,
)
from helpers.compiled import images
from helpers.exported import (
    EXPORT_WARNINGS,
    UNSEEN,
    needs_onnx,
    onnx_program,
    onnx_runtime,
    smallest_size,
)

pytestmark = [pytest.mark.slow, needs_onnx, *EXPORT_WARNINGS]

FORMS: dict[str, Callable[[], nn.Module]] = {
    **{case.name: partial(case.build, 6, torch.float32) for case in CASES},
    "fully_attentional-projected": partial(fullattn.FullyAttentional, 6, gamma_init=0.7),
    "fully_attentional-scaled": partial(FULLY_ATTENTIONAL.build, 6, torch.float32, scale=None),
    "channel-scaled": partial(CHANNEL.build, 6, torch.float32, scale=None),
    "spatial-normalised": partial(fullattn.SpatialNonLocal, 6, zero_init=False),
}


@pytest.mark.parametrize("build", FORMS.values(), ids=FORMS)
def test_onnx_agrees_with_eager_at_unseen_sizes(build: Callable[[], nn.Module]) -> None:
    layer = build().eval()
    run = onnx_runtime(onnx_program(layer, *images((2, 6, 8, 9)), smallest_size(layer)))
    for x in images(*UNSEEN):
        assert_near(run(x), layer(x), torch.float32)


@pytest.mark.parametrize("case", [FULLY_ATTENTIONAL, CHANNEL, SPATIAL], ids=lambda case: case.name)
def test_onnx_in_float16_agrees_with_eager_at_unseen_sizes(case: Case) -> None:
    layer = case.build(6, torch.float16).eval()
    (example,) = images((2, 6, 8, 9), dtype=torch.float16)
    run = onnx_runtime(onnx_program(layer, example, 2))
    for x in images(*UNSEEN, dtype=torch.float16):
        assert_near(run(x), layer(x), torch.float16)


@pytest.mark.parametrize(
    "case",
    [FULLY_ATTENTIONAL, CHANNEL, SPATIAL, SPATIAL_GAUSSIAN],
    ids=lambda case: case.name,
)
def test_onnx_keeps_float16_scores_in_float32(case: Case) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    layer = case.build(6, torch.float16).eval()
    # Unscaled scores of numbers of this size are far beyond the 65504 at which float16 ends.
    x, other = (1000 * each for each in images((2, 6, 8, 9), (3, 6, 7, 5), dtype=torch.float16))
    # Not onnxruntime, which computes float16 in float32 on a CPU and so hides an overflow.
    evaluator = ReferenceEvaluator(onnx.load_model_from_string(onnx_program(layer, x, 2)))
    (found,) = evaluator.run(None, {evaluator.input_names[0]: other.numpy()})
    assert_near(torch.as_tensor(found), layer(other), torch.float16)
