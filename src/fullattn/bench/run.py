"""One run: every implementation at every shape, interleaved."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from fullattn._cli.conditions import Conditions, Mode, environment
from fullattn._cli.errors import UsageError
from fullattn._cli.inputs import check_fits, check_image, feature_map, random_like
from fullattn._cli.output import written_together
from fullattn._cli.shapes import Shape
from fullattn._cli.terminal import progress
from fullattn.bench import chart, compare, memory
from fullattn.bench.implementations import OFFICIAL, Implementation, implementations_at
from fullattn.bench.measure import Plan, measure_group, sharing
from fullattn.bench.results import Failure, Measurement, Results, Row
from fullattn.bench.table import print_results
from fullattn.bench.verdict import headline
from fullattn.bench.workload import LayerRecipe, ShapeError, Workload
from fullattn.layers import LAYERS

__all__ = ["Options", "bench", "measure_all"]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        shapes: each with the modes to measure at it.
        conditions: shared by all implementations.
        layers: names of registered layers; all of them if there are none.
        backends: names of backends, or "default", "auto", "all".
        modules: where the user's classes are.
        baseline: the implementation that ratios refer to.
        sweep: "resolution" or "channels" if the shapes are a sweep, for the picture.
        plan: how often to time a call, and whether to measure its memory.
    """

    shapes: Sequence[tuple[Shape, tuple[Mode, ...]]]
    conditions: Conditions
    layers: Sequence[str] = ()
    backends: Sequence[str] = ("default",)
    modules: Sequence[str] = ()
    baseline: str = OFFICIAL
    sweep: str | None = None
    plan: Plan = field(default_factory=Plan)


def bench(options: Options, folder: Path, old: Results | None, console: Console) -> Results:
    """Measure, print the tables, write the JSON and the picture.

    Args:
        options: what to run.
        folder: where the files go.
        old: an earlier run to compare with.
        console: where the tables go; the progress bar goes to standard error.

    Returns:
        The results.

    Raises:
        UsageError: an option does not fit; nothing is written then.
    """
    if old is not None:
        compare.check_comparable(old.conditions, options.conditions)
    if options.conditions.image is not None:
        check_image(options.conditions.image)
    name = "sweep" if options.sweep else "bench"
    with written_together(folder) as part:
        results = measure_all(options)
        try:
            (part / f"{name}.json").write_text(results.to_json(), encoding="utf-8")
            chart.draw(results, part / f"{name}.png")
        except OSError as error:
            raise UsageError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
    print_results(results, console)
    if old is not None:
        compare.print_differences(old, results, console)
    console.print(
        f"\n{folder / name}.json\n{folder / name}.png",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for mode in results.modes:
        if said := headline(results, mode):
            console.print(f"\n{said}", highlight=False, markup=False)
    return results


def measure_all(options: Options) -> Results:
    """Measure every implementation at every shape.

    Args:
        options: what to run.

    Returns:
        The results.

    Raises:
        UsageError: a module or the baseline does not exist, or a module returns another shape.
    """
    conditions = options.conditions
    chosen = {
        shape: implementations_at(
            shape,
            conditions,
            layers=options.layers or tuple(LAYERS),
            backends=options.backends,
            modules=options.modules,
        )
        for shape, _ in options.shapes
    }
    _check_baseline(options.baseline, [each for found in chosen.values() for each in found])
    for shape, implementations in chosen.items():
        # The official implementation has the parameters of "fully".
        layers = {"fully", *(each.layer for each in implementations if each.layer in LAYERS)}
        built: list[nn.Module] = [LAYERS[layer](shape.channels, device="meta") for layer in layers]
        check_fits(shape, max(sum(p.numel() for p in layer.parameters()) for layer in built))
    # The cheapest first: what they leave of their share of the budget goes to the others. Training
    # costs about four times as much as inference.
    groups = sorted(
        ((shape, mode) for shape, modes in options.shapes for mode in modes),
        key=lambda group: math.prod(group[0]) * (4 if group[1] == "training" else 1),
    )
    if options.plan.memory and conditions.device == "cpu":
        memory.start()
    here = environment(torch.device(conditions.device))
    measured: dict[tuple[Shape, Implementation], dict[Mode, Measurement]] = defaultdict(dict)
    with (
        conditions.limited_threads(),
        progress(sum(len(chosen[shape]) for shape, _ in groups), "rows") as advance,
    ):
        module_of = cache(lambda each, channels: each.build(channels, conditions))
        for shape in {shape.channels: shape for shape in chosen}.values():
            for target in options.modules:
                module = module_of(Implementation(target), shape.channels)
                _check_output(target, module, shape, conditions)
        # Each group ends when its part of the budget is used, and begins rows in half of that.
        for (shape, mode), end in sharing(groups, options.plan.budget):
            modules = {each: module_of(each, shape.channels) for each in chosen[shape]}
            for each, found in _measure(options, shape, mode, modules, end, advance).items():
                measured[shape, each][mode] = found
        rows = [
            Row(shape, each, formula, measured[shape, each])
            for shape, found in chosen.items()
            for each in found
            for formula in [each.formula(module_of(each, shape.channels), shape, conditions)]
        ]
    return Results(here, conditions, options.baseline, options.sweep, rows)


def _check_baseline(baseline: str, implementations: list[Implementation]) -> None:
    if not any(each.matches(baseline) for each in implementations):
        automatic = [each.layer for each in implementations if each.automatic]
        names = dict.fromkeys([*(each.name for each in implementations), *automatic])
        raise UsageError(f"expected a baseline of {', '.join(names)}, got {baseline!r}")


def _check_output(target: str, module: nn.Module, shape: Shape, conditions: Conditions) -> None:
    """Raise UsageError if a user's module returns another shape than its input's."""
    small = shape._replace(height=min(shape.height, 16), width=min(shape.width, 12))
    workload = Workload(module, feature_map(small, conditions), None)
    workload.prepare("inference")
    try:
        workload.run("inference")
    except ShapeError as error:
        raise UsageError(f"module {target!r}: {error}") from error
    except Exception:  # it may be made for large maps alone, or out of memory
        return


def _measure(
    options: Options,
    shape: Shape,
    mode: Mode,
    modules: Mapping[Implementation, nn.Module],
    end: float,
    advance: Callable[[float, str], None],
) -> dict[Implementation, Measurement]:
    """Measure all implementations at one shape in one mode, until `end` (monotonic)."""
    conditions, plan = options.conditions, options.plan
    x = feature_map(shape, conditions)
    grad = random_like(x, conditions.seed) if mode == "training" else None
    last_begin = (time.monotonic() + end) / 2
    # A run is made for the official implementation, the first layer and the baseline.
    needed = [*modules][:2] + [each for each in modules if each.matches(options.baseline)]

    def refuse(each: Implementation) -> Failure | None:
        if plan.budget is None or each in needed or time.monotonic() < last_begin:
            return None
        return Failure.no_time_left(plan.budget)

    return measure_group(
        {each: Workload(module, x, grad) for each, module in modules.items()},
        {each: LayerRecipe(each, shape, conditions) for each in modules},
        mode,
        plan,
        refuse=refuse,
        step=lambda each, part: advance(part, f"{shape} {mode}: {each.name}"),
        last_call=end,
    )
