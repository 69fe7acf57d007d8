"""Short training runs on tiny data, each in a new process that may be killed.

The processes are forked from a server that imported Lightning and computed nothing.
"""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from helpers import tiny_data

STEPS = 12
# 6 images in batches of 4: epochs end within steps.
SETTINGS = (
    f"training.steps={STEPS}",
    "training.batch_size=4",
    "training.checkpoint_every=4",
    "training.validate_every=6",
    "training.log_every=1",
    "data.crop=[24,32]",
    "data.workers=0",
)


@functools.cache
def processes() -> Any:
    """Return a multiprocessing context whose server has imported the slow modules."""
    forkserver._forkserver._stop()  # it may have been started for something else
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fullattn.segmentation.training.train", "timm"])
    return context


class Tiny(nn.Module):
    """A network with state (batch normalisation) and random numbers (dropout)."""

    arguments: ClassVar = {"norm_layer": nn.BatchNorm2d}  # as of a FLANet

    def __init__(self, norm: str = "batch", dropout: float = 0.2) -> None:
        super().__init__()
        norms: dict[str, nn.Module] = {"batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(2, 8)}
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norms[norm], nn.ReLU())
        self.dropout = nn.Dropout2d(dropout)
        self.context = nn.Linear(8, 8)
        self.head = nn.Conv2d(8, len(tiny_data.CAMVID), 1)
        self.auxiliary = nn.Conv2d(8, len(tiny_data.CAMVID), 1)
        self.calls = 0
        self.seeds: list[int] = []
        self.killed_in_call = -1

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        self.calls += 1
        if self.calls == self.killed_in_call:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.training:
            self.seeds.append(torch.initial_seed())
        features = self.backbone(x)
        features = features + self.context(features.mean((2, 3)))[:, :, None, None]
        logits: Tensor = self.head(self.dropout(features))
        return [logits, self.auxiliary(features)] if self.training else logits


class KilledWriter:
    """`torch.save` whose process is killed half-way through the n-th call."""

    def __init__(self, call: int) -> None:
        self.left = call
        self.save = torch.save

    def __call__(self, content: Any, file: Any) -> None:
        self.left -= 1
        if self.left:
            self.save(content, file)
            return
        whole = io.BytesIO()
        self.save(content, whole)
        half = whole.getvalue()[: whole.tell() // 2]
        if isinstance(file, str | Path):
            Path(file).write_bytes(half)
        else:
            file.write(half)
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def train(
    output: Path,
    root: Path,
    settings: tuple[str, ...] = (),
    *,
    environment: dict[str, str] | None = None,
    killed_in_call: int = -1,
    killed_in_save: int = 0,
    model: dict[str, Any] | None = None,
    train_split: str = "train",
    **options: Any,
) -> None:
    """Train in this process, and write the result to `output`.result, or `output`.error."""
    warnings.simplefilter("error")
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    # Workers of the data loaders would otherwise import everything again.
    multiprocessing.set_start_method("fork", force=True)
    from lightning.pytorch.utilities import rank_zero_only

    from fullattn.segmentation.data import open_dataset
    from fullattn.segmentation.training.config import read
    from fullattn.segmentation.training.fit import fit
    from fullattn.segmentation.training.train import check_machines

    # Lightning read the rank when it was imported, before it was set.
    rank_zero_only.rank = int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    network = Tiny(**(model or {}))
    network.killed_in_call = killed_in_call
    if killed_in_save:
        torch.save = KilledWriter(killed_in_save)
    config = read("camvid_small", [*SETTINGS, *settings])
    datasets = [open_dataset("camvid", root, split) for split in (train_split, "val")]
    rank = os.environ.get("RANK", "")
    try:
        result = fit(network, config, *datasets, output, check_machines(config), **options)
    except Exception as error:
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        output.with_name(f"{output.name}.error{rank}").write_text(text)
        raise
    found = {
        "weights": network.state_dict(),
        "calls": network.calls,
        "seeds": network.seeds,
        "skipped": result.skipped,
        "mean_iou": result.scores.mean_iou if result.scores else None,
        "confusion": result.scores.confusion if result.scores else None,
    }
    torch.save(found, output.with_name(f"{output.name}.result{rank}"))


def start(*arguments: Any, **options: Any) -> Any:
    """Start `train` in a new process."""
    process = processes().Process(target=train, args=arguments, kwargs=options)
    process.start()
    return process


def finished(started: list[Any], seconds: float = 100) -> list[int]:
    """Wait for processes, kill all if one fails or is too slow, and return their exit codes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not any(process.exitcode for process in started):
        alive = [process.sentinel for process in started if process.is_alive()]
        if not alive:
            break
        connection.wait(alive, 1)
    for process in started:
        process.join(2)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def run(output: Path, root: Path, *settings: str, **options: Any) -> int:
    """Run `train` in a new process, and return its exit code; negative for a signal."""
    (code,) = finished([start(output, root, settings, **options)])
    return code


def run_two(output: Path, root: Path, *settings: str, port: int, **options: Any) -> list[int]:
    """Run `train` in two processes as torchrun starts them, and return their exit codes."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    both = [
        start(
            output,
            root,
            settings,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
        )
        for rank in range(2)
    ]
    return finished(both)


def result(output: Path, rank: str = "") -> dict[str, Any]:
    """Load the result of a run."""
    found: dict[str, Any] = torch.load(output.with_name(f"{output.name}.result{rank}"))
    return found


def tensors(found: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a checkpoint with its path in it."""
    if isinstance(found, dict | list | tuple):
        entries = found.items() if isinstance(found, dict) else enumerate(found)
        for key, value in entries:
            yield from tensors(value, f"{name}/{key}")
    else:
        yield name, found
