"""Two processes, or accumulation, yield the weights of one process with the whole batch."""

from __future__ import annotations

import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import tiny_data
from helpers.tiny_training import STEPS, result, run, run_two

pytestmark = pytest.mark.slow

# float64 for a strict comparison. Group normalisation, because batch normalisation depends on the
# batch of a process; no dropout, whose random numbers depend on the rank; no clipping, which would
# hide a wrong factor on the gradient.
SETTINGS = (
    "training.precision=64-true",
    "training.clip_gradient_norm=null",
    "training.learning_rate=0.2",
)
OPTIONS: dict[str, Any] = {"model": {"norm": "group", "dropout": 0.0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Five images, so that the two processes evaluate different numbers of images.
    return tiny_data.camvid(tmp_path_factory.mktemp("data"), images=5)


@pytest.fixture(scope="module")
def one(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    assert run(output, root, *SETTINGS, **OPTIONS) == 0
    return output


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
    return port


def assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-14) -> None:
    """Compare weights up to rounding: the order of sums differs."""
    for name, weight in expected["weights"].items():
        # Absolute, because training moved all weights by about 0.1, also those far from 0.
        error = (found["weights"][name] - weight).abs().max()
        assert error < tolerance, f"{name} differs by {error}"


def test_two_processes_equal_one(root: Path, one: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = (*SETTINGS, "training.strategy=ddp")
    assert run_two(output, root, *settings, port=free_port(), **OPTIONS) == [0, 0]
    for rank in "01":
        assert_same(result(output, rank), result(one))
        assert torch.equal(result(output, rank)["confusion"], result(one)["confusion"])
    # Dropout differs between processes and steps.
    seeds = [seed for rank in "01" for seed in result(output, rank)["seeds"]]
    assert len(set(seeds)) == len(seeds) == 2 * STEPS


def test_sharding_over_two_processes_and_resuming_equals_one_process(
    root: Path, tmp_path: Path
) -> None:
    # Lightning shards in float32 only; rounding errors grow over the steps.
    one, output = tmp_path / "one", tmp_path / "run"
    assert run(one, root, "training.clip_gradient_norm=0.5", **OPTIONS) == 0
    settings = ("training.clip_gradient_norm=0.5", "training.strategy=fsdp")
    killed = run_two(output, root, *settings, port=free_port(), killed_in_call=7, **OPTIONS)
    assert killed == [-signal.SIGKILL] * 2
    resumed = run_two(output, root, *settings, port=free_port(), resume=True, **OPTIONS)
    assert resumed == [0, 0]
    weights = torch.load(output / "last.ckpt", weights_only=True)["state_dict"]
    found = {name.removeprefix("model."): weight for name, weight in weights.items()}
    assert_same({"weights": found}, result(one), tolerance=1e-5)


def test_accumulation_equals_the_whole_batch(root: Path, one: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(output, root, *SETTINGS, "training.accumulate=4", **OPTIONS) == 0
    assert_same(result(output), result(one))
    seeds = result(output)["seeds"]
    assert len(set(seeds)) == len(seeds) == 4 * STEPS


def test_workers_load_the_same_images_as_the_main_process(
    root: Path, one: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    assert run(output, root, *SETTINGS, "data.workers=2", **OPTIONS) == 0
    for name, weight in result(one)["weights"].items():
        assert torch.equal(result(output)["weights"][name], weight), name
