"""Whether torch.compile makes a layer faster or slower than calling it.

    python benchmarks/compiled.py
    python benchmarks/compiled.py --shape 4 128 64 64 --seconds 30 --layers FullyAttentional

Each layer and its compiled self (inductor, `fullgraph=True`, static) take turns with one input in
one process, which makes the ratio of two medians hold on a machine that is not quiet. The spread is
from the second fastest to the second slowest call.

The last row is the 3x3 convolution that `FullyAttentional` ends in, alone: Inductor rewrites every
convolution to channels_last, which on some processors is slower than what it replaces, and is to be
told from what the attention costs. `--keep-layouts` switches that off.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch._inductor import config as inductor

from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal
from fullattn._cli.conditions import MODES
from fullattn.bench.measure import Plan, interleave, warm_up
from fullattn.bench.workload import Workload

LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "FullyAttentional": partial(FullyAttentional, gamma_init=0.7, project=False),
    "FullyAttentional, projected": partial(FullyAttentional, gamma_init=0.7),
    "ChannelNonLocal": partial(ChannelNonLocal, gamma_init=0.7),
    "SpatialNonLocal": partial(SpatialNonLocal, zero_init=False),
    "3x3 convolution": lambda channels: nn.Conv2d(channels, channels, 3, padding=1, bias=False),
}


def summary(times: list[float]) -> str:
    """Return the median of milliseconds and their spread."""
    ordered = sorted(times)
    inner = ordered[1:-1] or ordered
    return f"{statistics.median(ordered):8.1f} ({inner[0]:.0f} to {inner[-1]:.0f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=[1, 512, 97, 97], metavar="N")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each pair and mode")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--keep-layouts", action="store_true", help="no layouts by Inductor")
    options = parser.parse_args()
    inductor.layout_optimization = not options.keep_layouts

    plan = Plan(seconds=options.seconds / 2, at_least=5, at_most=31)
    print(
        f"{options.shape}, float32, {options.device}, {torch.get_num_threads()} threads, ", end=""
    )
    print(f"PyTorch {torch.__version__}; milliseconds")
    heads = "layer", "mode", "eager", "compiled", "eager / compiled"
    print("{:28} {:10} {:>24} {:>24} {:>18}".format(*heads))
    for name in options.layers:
        torch.manual_seed(0)
        layer = LAYERS[name](options.shape[1]).to(options.device)
        x = torch.randn(options.shape, device=options.device)
        grad = torch.randn_like(x)
        for mode in MODES:
            torch.compiler.reset()
            pair = {
                "eager": Workload(layer, x, grad),
                "compiled": Workload(torch.compile(layer, fullgraph=True), x, grad),
            }
            for workload in pair.values():
                warm_up(workload, mode)  # compiles
            each = [warm_up(workload, mode) for workload in pair.values()]
            calls = dict.fromkeys(pair, plan.calls(max(each)))
            times, failures = interleave(pair, calls, mode)
            if failures:
                raise SystemExit(f"{name}, {mode}: {failures}")
            eager, compiled = (times[each] for each in pair)
            ratio = statistics.median(eager) / statistics.median(compiled)
            columns = name, mode, summary(eager), summary(compiled), ratio
            print("{:28} {:10} {:>24} {:>24} {:>17.2f}×".format(*columns), flush=True)


if __name__ == "__main__":
    main()
