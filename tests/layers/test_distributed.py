"""Two processes that each see half of a batch train a layer as one process with all of it does."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    pytest.skip("FSDP2 comes with PyTorch 2.6", allow_module_level=True)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fullattn
from fullattn._versions import VERSION
from helpers.cases import assert_near

pytestmark = pytest.mark.slow

PROCESSES = 2
STEPS = 2

# BatchNorm2d sees only its process's half of the batch, and SyncBatchNorm does not run on a CPU.
NORM = partial(nn.GroupNorm, 2)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "fully attentional": partial(fullattn.FullyAttentional, 8, gamma_init=0.7, norm_layer=NORM),
    "fully attentional, gamma 0": partial(fullattn.FullyAttentional, 8, norm_layer=NORM),
    "fully attentional, gamma 0, no projection": partial(
        fullattn.FullyAttentional, 8, project=False
    ),
    "channel": partial(fullattn.ChannelNonLocal, 8, gamma_init=0.7),
    "channel, gamma 0": partial(fullattn.ChannelNonLocal, 8),
    "spatial": partial(fullattn.SpatialNonLocal, 8, norm_layer=None, zero_init=False),
    "spatial, output 0": partial(fullattn.SpatialNonLocal, 8, norm_layer=None),
    "spatial, concatenation": partial(
        fullattn.SpatialNonLocal, 8, norm_layer=NORM, mode="concatenation"
    ),
}
# float64 for a sharp comparison, and float32 for the C kernel, which takes no float64.
CASES = [(name, torch.float64) for name in LAYERS] + [("fully attentional", torch.float32)]


def network(name: str, dtype: torch.dtype) -> nn.Sequential:
    """A small network with one layer in the middle, the same in every process."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), LAYERS[name](), nn.Conv2d(8, 4, 1)
    return nn.Sequential(*layers).to(dtype)


def train(model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, list[str]]:
    """Two steps: the loss of each, and which parameters had no gradient in the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses: list[Tensor] = []
    without: list[str] = []
    for step in range(STEPS):
        loss = nn.functional.mse_loss(model(images), targets)
        loss.backward()
        if step == 0:
            without = [name for name, each in model.named_parameters() if each.grad is None]
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), without


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two images for each process and what the network is to make of them."""
    generator = torch.Generator().manual_seed(1)
    images, targets = (
        torch.randn(2 * PROCESSES, channels, 7, 6, generator=generator, dtype=torch.float64)
        for channels in (3, 4)
    )
    return images.to(dtype), targets.to(dtype)


def replicated(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharded_inside(model: nn.Sequential) -> nn.Module:
    """Every module of the layer by itself, gathered when the layer calls it."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for each in model[2].modules():
        if each is not model[2] and any(True for _ in each.parameters(recurse=False)):
            fully_shard(each, mesh=mesh)
    return sharded(model)


def whole(parameter: Tensor) -> Tensor:
    """A parameter, put together from its shards."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def train_a_half(
    rank: int, store: str, results: str, distribute: Callable[[nn.Sequential], nn.Module]
) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{store}",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=120),
    )
    found: list[dict[str, Any]] = []
    for name, dtype in CASES:
        model = network(name, dtype)
        halves = [each.chunk(PROCESSES)[rank] for each in batch(dtype)]
        losses, without = train(distribute(model), *halves)
        weights = [whole(each) for each in model.parameters()]
        found.append({"losses": losses, "without": without, "weights": weights})
    torch.save(found, f"{results}{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "distribute",
    [replicated, sharded, sharded_inside],
    ids=["DDP", "FSDP2", "FSDP2 inside of the layer"],
)
def test_two_processes_train_as_one_does(
    distribute: Callable[[nn.Sequential], nn.Module], tmp_path: Path
) -> None:
    if distribute is not replicated and VERSION < (2, 9):
        pytest.skip("on a CPU FSDP2 fails in PyTorch 2.6, and in 2.8 doubles float32 gradients")
    # All layers in one launch: most of its time goes into starting the processes.
    arguments = (str(tmp_path / "store"), str(tmp_path / "results"), distribute)
    mp.spawn(train_a_half, arguments, nprocs=PROCESSES)
    processes = [torch.load(tmp_path / f"results{rank}") for rank in range(PROCESSES)]
    for (name, dtype), *found in zip(CASES, *processes, strict=True):
        model = network(name, dtype)
        starts = [each.detach().clone() for each in model.parameters()]
        losses, _ = train(model, *batch(dtype))
        for rank, each in enumerate(found):
            assert each["without"] == [], f"{name}: no gradient at the first step in process {rank}"
        joint = torch.stack([each["losses"] for each in found]).mean(dim=0)
        assert_near(joint, losses, dtype, what=f"{name}: loss")
        for each in found:
            parameters = zip(model.named_parameters(), each["weights"], starts, strict=True)
            for (parameter, expected), actual, start in parameters:
                # Of a weight that moves little, the weight itself would say little.
                what = f"{name}: steps of {parameter}"
                assert_near(actual - start, expected - start, dtype, size=0.01, what=what)
        steps = [
            (now - start).abs().max()
            for now, start in zip(model[2].parameters(), starts[2:-2], strict=True)
        ]
        assert max(steps) > 0.001, f"{name}: the layer was not trained"
