"""The layers in AOTInductor packages, exported once with dynamic sizes and run at other sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.cases import CHANNEL, FULLY_ATTENTIONAL, SPATIAL, Case, assert_near
from helpers.compiled import images
from helpers.exported import EXPORT_WARNINGS, UNSEEN, aot_inductor, needs_compiler, smallest_size

pytestmark = [pytest.mark.slow, pytest.mark.network, needs_compiler, *EXPORT_WARNINGS]


@pytest.mark.parametrize("case", [FULLY_ATTENTIONAL, CHANNEL, SPATIAL], ids=lambda case: case.name)
def test_an_aot_inductor_package_agrees_with_eager_at_unseen_sizes(
    case: Case, tmp_path: Path
) -> None:
    layer = case.build(6, torch.float32).eval().requires_grad_(False)
    run = aot_inductor(layer, *images((2, 6, 8, 9)), smallest_size(layer), tmp_path)
    for x in images(*UNSEEN):
        assert_near(run(x), layer(x), torch.float32)
