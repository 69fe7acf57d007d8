"""`fullattn swap`: a network before and after a change, measured interleaved, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fullattn._cli.conditions import Mode, environment
from fullattn._cli.errors import UsageError
from fullattn._cli.inputs import check_fits
from fullattn._text import si
from fullattn.bench.measure import Plan, measure_group
from fullattn.bench.results import Measurement
from fullattn.bench.table import mebibytes, ratio, time
from fullattn.swap import Report, count_flops
from fullattn.swap.network import Network, NetworkWorkload

__all__ = ["compare"]

_TITLES: dict[Mode, str] = {"inference": "forward", "training": "forward + backward"}


@dataclass(frozen=True)
class _Side:
    """The network before or after the change."""

    network: Network
    workload: NetworkWorkload
    measured: dict[Mode, Measurement]

    @classmethod
    def of(cls, network: Network, model: nn.Module, images: Tensor) -> _Side:
        return cls(network, NetworkWorkload(model, images, None), {})

    @property
    def parameters(self) -> int:
        return sum(x.numel() for x in self.workload.module.parameters())


def compare(network: Network, modes: tuple[Mode, ...], plan: Plan, console: Console) -> None:
    """Measure a network as it is and as it is after its change, and print both.

    Args:
        network: with a target.
        modes: which of "inference" and "training".
        plan: how often each call is timed, and whether its memory is measured.
        console: where to print.

    Raises:
        UsageError: the network cannot be built, changed or called.
    """
    check_fits(network.shape)
    changed, report = network.built()
    assert report is not None
    untouched = replace(network, target=None)
    images = network.images()
    sides = {
        "before": _Side.of(untouched, untouched.built()[0], images),
        "after": _Side.of(network, changed, images),
    }
    with network.conditions.limited_threads():
        for mode in modes:
            found = measure_group(
                {name: side.workload for name, side in sides.items()},
                {name: side.network for name, side in sides.items()},
                mode,
                plan,
            )
            for name, side in sides.items():
                side.measured[mode] = found[name]
    measured = sides["before"].measured.values()
    reasons = [m.failure.reason for m in measured if m.failure is not None]
    if len(reasons) == len(modes):
        raise UsageError(f"the model does not run: {'; '.join(dict.fromkeys(reasons))}")
    _print(sides, report, modes, console)


def _print(
    sides: Mapping[str, _Side], report: Report, modes: tuple[Mode, ...], console: Console
) -> None:
    before, after = sides["before"], sides["after"]
    network = after.network
    console.print()
    console.print(str(report), highlight=False, markup=False)
    table = Table(title=network.factory, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("before", "after", "after / before"):
        table.add_column(heading, justify="right", no_wrap=True)
    pair = before.parameters, after.parameters
    table.add_row("parameters", *map(si, pair), ratio(_quotient(*pair)))
    flops = [count_flops(side.workload.module, network.shape) for side in (before, after)]
    table.add_row("FLOPs", *map(si, flops), ratio(_quotient(*flops)))
    for mode in modes:
        one, two = before.measured[mode], after.measured[mode]
        quotient = _quotient(one.median_ms, two.median_ms)
        table.add_row(f"{_TITLES[mode]}, ms", time(one), time(two), ratio(quotient))
        peaks = one.peak_bytes, two.peak_bytes
        if any(peaks):
            cells = map(mebibytes, peaks)
            table.add_row(f"{_TITLES[mode]}, peak MiB", *cells, ratio(_quotient(*peaks)))
    console.print()
    console.print(table)
    conditions, here = network.conditions, environment(before.workload.x.device)
    given = f"image {conditions.image}" if conditions.image else "normal noise"
    for line in (
        f"{network.shape}, {given}, {conditions.dtype}, {conditions.memory_format}, random weights "
        f"(seed {conditions.seed})",
        f"{here.device_name}, {conditions.threads} threads, PyTorch {here.torch}, "
        f"fullattn {here.fullattn}, {here.date}"
        + ("" if here.load is None else f", load {here.load:g}"),
        "Times: median ± interquartile range of interleaved calls. Peaks: over parameters and "
        "input.",
        "FLOPs are 2 × multiply-accumulate, of one forward.",
        *(
            f"{name}, {_TITLES[mode]}: {measurement.failure.reason}"
            for name, side in sides.items()
            for mode, measurement in side.measured.items()
            if measurement.failure is not None
        ),
    ):
        console.print(line, style="dim", highlight=False, markup=False)


def _quotient(before: float | None, after: float | None) -> float | None:
    return after / before if before and after is not None else None
