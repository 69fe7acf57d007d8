"""A training step of FLANet with this package's layer against the official implementation.

    python benchmarks/flanet_step.py
    python benchmarks/flanet_step.py --backbone resnet50 --shape 2 3 384 384 --calls 7

Two networks with the same weights, from the backbone to the auxiliary heads, take turns with one
batch in one process; a step is forward, backward and SGD with momentum. Peak memory is over what
was there before the call, forward and backward without the optimizer, each network in a process of
its own. The official implementation is the one of `fullattn bench`, with its batches corrected.
Writes benchmarks/results/cpu/flanet_step_BACKBONE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullattn._cli.conditions import Conditions, device_name
from fullattn._cli.shapes import Shape
from fullattn.bench.memory import Probe, cpu_peak
from fullattn.bench.official import OfficialFLANetBlock
from fullattn.segmentation.models import FLANet
from fullattn.swap.network import Network

RESULTS = Path(__file__).parent / "results" / "cpu"


def ours(**options: Any) -> nn.Module:
    """Build the network with `FullyAttentional`."""
    return FLANet(19, attention="fully", attention_options={"gamma_init": 0.7}, **options)


def official(**options: Any) -> nn.Module:
    """Build the same network with the official implementation in the layer's place."""

    def attention(channels: int) -> nn.Module:
        layer = OfficialFLANetBlock(channels)
        nn.init.constant_(layer.gamma, 0.7)
        return layer

    return FLANet(19, attention=attention, **options)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One step; returns its loss."""
    main, *auxiliary = net(images)
    loss = F.cross_entropy(main, labels)
    for logits in auxiliary:
        loss = loss + 0.4 * F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="resnet101s.gluon_in1k")
    parser.add_argument("--shape", type=int, nargs=4, default=[2, 3, 256, 512], metavar="N")
    parser.add_argument("--calls", type=int, default=7, help="timed steps of each")
    args = parser.parse_args()
    options = {"backbone": args.backbone, "dropout": 0.0}

    torch.manual_seed(0)
    images = torch.randn(args.shape)
    labels = torch.randint(0, 19, (args.shape[0], *args.shape[2:]))
    nets = {"fullattn": ours(**options), "official": official(**options)}
    nets["official"].load_state_dict(nets["fullattn"].state_dict())
    sides = {
        name: (net.train(), torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9))
        for name, net in nets.items()
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for call in range(args.calls + 1):
        for name, (net, optimizer) in sides.items():
            start = time.perf_counter()
            loss = step(net, optimizer, images, labels)
            if call:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - start))
            losses[name].append(loss)
    del nets, sides

    threads = torch.get_num_threads()
    conditions = Conditions(
        device="cpu",
        dtype="float32",
        memory_format="contiguous",
        project=False,
        threads=threads,
        seed=0,
        image=None,
    )
    memory = {}
    for name, factory in (("fullattn", "ours"), ("official", "official")):
        network = Network(f"{__file__}:{factory}", options, Shape(*args.shape), conditions)
        found = cpu_peak(network, "training", limit=600)
        if not isinstance(found, Probe):
            raise SystemExit(f"memory of {name}: {found}")
        memory[name] = found.peak_bytes

    result = {
        "backbone": args.backbone,
        "shape": args.shape,
        "device": device_name(torch.device("cpu")),
        "threads": threads,
        "torch": torch.__version__,
        "milliseconds": times,
        "losses": losses,
        "peak_bytes": memory,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"flanet_step_{args.backbone.partition('.')[0]}.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(f"FLANet, {args.backbone}, {args.shape}, {threads} threads, PyTorch {torch.__version__}")
    for name, each in times.items():
        print(
            f"{name:<10} {statistics.median(each):8.0f} ms ({min(each):.0f} to {max(each):.0f}), "
            f"peak {memory[name] / 2**20:.0f} MiB, last loss {losses[name][-1]:.6f}"
        )
    ratios = [b / a for a, b in zip(times["fullattn"], times["official"], strict=True)]
    print(f"official / fullattn: {statistics.median(ratios):.3f} (median of pairs)")


if __name__ == "__main__":
    main()
