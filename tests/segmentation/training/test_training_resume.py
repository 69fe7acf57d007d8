"""A run that is killed and resumed ends with the weights of an unbroken run, bit for bit."""

from __future__ import annotations

import operator
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny_data, tiny_training
from helpers.tiny_training import STEPS, run, tensors

pytestmark = pytest.mark.slow

# Settings with a state that a resumed run could lose: momentum, averages, accumulation, warm-up.
SETTINGS = (
    "training.accumulate=2",
    "training.average_decay=0.9",
    "training.clip_gradient_norm=1.0",
    "training.warmup_steps=3",
)
# Two forward passes a step, and six in an evaluation after steps 6 and 12.
BEFORE_ANY_CHECKPOINT = 5
AFTER_STEP_4 = 2 * 5 + 1
WITHIN_STEP_6 = 2 * 6
IN_VALIDATION = 2 * 6 + 3
AFTER_STEP_10 = 2 * 10 + 6 + 1
IN_LAST_VALIDATION = 2 * 12 + 6 + 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.camvid(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(output, root, *SETTINGS) == 0
    return output


def checkpoint(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def assert_same(one: Path, other: Path) -> None:
    """Compare two runs' checkpoints, except for paths and for the loops' counts of restarts."""
    for name in ("last.ckpt", "best.ckpt"):
        found = [checkpoint(folder / name) for folder in (one, other)]
        for each in found:
            del each["loops"]
            kept = {k: v for k, v in each["callbacks"].items() if "ModelCheckpoint" not in k}
            each["callbacks"] = kept
        leaves = [dict(tensors(each)) for each in found]
        assert leaves[0].keys() == leaves[1].keys()
        for key, value in leaves[0].items():
            same = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert same(value, leaves[1][key]), f"{name}: {key}"


@pytest.mark.parametrize(
    ("kill", "left_at"),
    [
        ({"killed_in_call": BEFORE_ANY_CHECKPOINT}, None),
        ({"killed_in_save": 1}, None),
        ({"killed_in_call": AFTER_STEP_4}, 4),
        ({"killed_in_call": WITHIN_STEP_6}, 4),
        ({"killed_in_call": IN_VALIDATION}, 4),
        ({"killed_in_save": 2}, 4),  # best.ckpt, after step 6
        ({"killed_in_save": 3}, 4),  # last.ckpt, after step 8
        ({"killed_in_call": AFTER_STEP_10}, 8),
        ({"killed_in_call": IN_LAST_VALIDATION}, 8),
        ({"killed_in_save": 5}, 8),  # last.ckpt, after the last step
    ],
    ids=str,
)
def test_killed_and_resumed_equals_unbroken(
    kill: dict[str, int], left_at: int | None, root: Path, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert run(output, root, *SETTINGS, **kill) == -signal.SIGKILL
    if left_at is None:
        assert not (output / "last.ckpt").exists()
    else:
        assert checkpoint(output / "last.ckpt")["global_step"] == left_at
    assert len(list(output.glob(".*.part"))) == ("killed_in_save" in kill)
    assert run(output, root, *SETTINGS, resume=True) == 0
    assert checkpoint(output / "last.ckpt")["global_step"] == STEPS
    assert not list(output.glob(".*.part"))
    assert_same(unbroken, output)
    before, after = tiny_training.result(unbroken), tiny_training.result(output)
    for name, weight in before["weights"].items():
        assert torch.equal(weight, after["weights"][name]), name
    assert torch.equal(before["confusion"], after["confusion"])
    # The run continued from the checkpoint and did not start again.
    steps = STEPS - (left_at or 0)
    validations = 2 if steps > 6 else 1
    assert after["calls"] == 2 * steps + 6 * validations
