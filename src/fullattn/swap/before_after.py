"""`fullattn swap`: a network before and after a change, measured interleaved, as one table."""

from __future__ import annotations

import time as clock
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table

from fullattn._cli.conditions import Environment, Mode, environment
from fullattn._cli.errors import UsageError
from fullattn._cli.inputs import check_fits
from fullattn._cli.terminal import progress
from fullattn._text import counted, si
from fullattn.bench.measure import Plan, measure_group, sharing
from fullattn.bench.results import Failure, Measurement
from fullattn.bench.table import mebibytes, ratio, time
from fullattn.bench.verdict import verdict
from fullattn.layers import LAYERS
from fullattn.swap import Report, count_flops
from fullattn.swap.network import Network, NetworkWorkload
from fullattn.swap.report import columns, count_parameters, notes

__all__ = ["Side", "compare", "print_report", "print_sides"]

_TITLES: dict[Mode, str] = {"inference": "forward", "training": "forward + backward"}


@dataclass(frozen=True)
class Side:
    """The network before or after the change.

    Attributes:
        parameters: number of parameters.
        flops: of one forward; None if unknown.
        measured: by mode.
    """

    parameters: int
    flops: int | None
    measured: dict[Mode, Measurement]


def compare(network: Network, modes: tuple[Mode, ...], plan: Plan, console: Console) -> None:
    """Print what a change does to a network, then measure it before and after and print both.

    Args:
        network: with a target.
        modes: which of "inference" and "training".
        plan: how often each call is timed, and whether its memory is measured.
        console: where to print; the progress bar goes to standard error.

    Raises:
        UsageError: the network cannot be built, changed or called.
    """
    check_fits(network.shape)
    changed, report = network.built()
    assert report is not None
    untouched = replace(network, target=None)
    recipes = {"before": untouched, "after": network}
    images = network.images()
    workloads = {
        name: NetworkWorkload(model, images, None)
        for name, model in (("before", untouched.built()[0]), ("after", changed))
    }
    print_report(report, console)
    sides = {
        name: Side(count_parameters(each.module), count_flops(each.module, network.shape), {})
        for name, each in workloads.items()
    }
    here = environment(images.device)
    with (
        network.conditions.limited_threads(),
        progress(len(modes) * len(sides), "rows") as advance,
    ):

        def step(mode: Mode, name: str, part: float) -> None:
            advance(part, f"{_TITLES[mode]}, {name}")

        for mode, end in sharing(modes, plan.budget):
            if plan.budget and mode != modes[0] and clock.monotonic() > end:
                found = dict.fromkeys(sides, Measurement(failure=Failure.no_time_left(plan.budget)))
            else:
                found = measure_group(
                    workloads,
                    recipes,
                    mode,
                    plan,
                    step=partial(step, mode),
                    last_call=end,
                )
            for name, side in sides.items():
                side.measured[mode] = found[name]
    before = sides["before"].measured.values()
    reasons = [m.failure.reason for m in before if m.failure is not None]
    if len(reasons) == len(modes):
        raise UsageError(f"the model does not run: {'; '.join(dict.fromkeys(reasons))}")
    print_sides(network, sides, here, console)


def print_report(report: Report, console: Console) -> None:
    """Print the changes: as the report's own table, or in sentences where that is too wide."""
    lines = str(report).splitlines()
    if max(map(len, lines)) > console.width:
        lines = []
        for change in report.changes:
            name, old, new, channels, parameters, flops, at = columns(change)
            lines += [
                f"{name}: {old} becomes {new}",
                f"  channels {channels}, parameters {parameters}, FLOPs {flops} at {at}",
                *notes(change),
            ]
    console.print()
    for line in lines:
        console.print(line, highlight=False, markup=False)


def print_sides(
    network: Network, sides: Mapping[str, Side], here: Environment, console: Console
) -> None:
    """Print both sides as a table, the conditions, and a sentence on each mode.

    Args:
        network: that was measured.
        sides: "before" and "after".
        here: where it was measured.
        console: where to print.
    """
    before, after = sides["before"], sides["after"]
    table = Table(title=network.factory, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("before", "after", "after / before"):
        table.add_column(heading, justify="right", no_wrap=True)
    pair = before.parameters, after.parameters
    table.add_row("parameters", *map(si, pair), ratio(_quotient(*pair)))
    flops = before.flops, after.flops
    table.add_row("FLOPs", *map(si, flops), ratio(_quotient(*flops)))
    for mode in before.measured:
        one, two = before.measured[mode], after.measured[mode]
        quotient = _quotient(one.median_ms, two.median_ms)
        table.add_row(f"{_TITLES[mode]}, ms", time(one), time(two), ratio(quotient))
        peaks = one.peak_bytes, two.peak_bytes
        if any(peaks):
            cells = map(mebibytes, peaks)
            table.add_row(f"{_TITLES[mode]}, peak MiB", *cells, ratio(_quotient(*peaks)))
    console.print()
    console.print(table)
    conditions = network.conditions
    given = f"image {conditions.image}" if conditions.image else "normal noise"
    for line in (
        f"{network.shape}, {given}, {conditions.dtype}, {conditions.memory_format}, random weights "
        f"(seed {conditions.seed})",
        f"{here.device_name}, {counted(conditions.threads, 'thread')}, PyTorch {here.torch}, "
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
    console.print()
    place = "behind" if network.behind else "in place of"
    for mode, base in before.measured.items():
        if said := verdict(after.measured[mode], base, "the unchanged network here"):
            what = f"{LAYERS[network.layer].__name__} {place} {network.target}, {mode}"
            console.print(f"{what}: {said}.", highlight=False, markup=False)


def _quotient(before: float | None, after: float | None) -> float | None:
    return after / before if before and after is not None else None
