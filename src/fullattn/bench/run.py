"""One run: every implementation at every shape, interleaved."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import nn

from fullattn._cli.conditions import Conditions, Mode, available_bytes, environment
from fullattn._cli.errors import UsageError
from fullattn._cli.inputs import check_image, feature_map, random_like
from fullattn._cli.output import written_together
from fullattn._cli.shapes import Shape
from fullattn.attention.dispatch import BACKENDS
from fullattn.bench import chart, compare
from fullattn.bench.group import LeftOut, measure_group
from fullattn.bench.implementations import OFFICIAL, Formula, Implementation, implementations_at
from fullattn.bench.measure import Failure, Plan
from fullattn.bench.memory import CpuMemory
from fullattn.bench.results import Measurement, Results, Row
from fullattn.bench.table import print_results
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
        plan: how often to time a call.
        memory: whether to measure peak memory.
    """

    shapes: Sequence[tuple[Shape, tuple[Mode, ...]]]
    conditions: Conditions
    layers: Sequence[str] = ()
    backends: Sequence[str] = ("default",)
    modules: Sequence[str] = ()
    baseline: str = OFFICIAL
    sweep: str | None = None
    plan: Plan = field(default_factory=Plan)
    memory: bool = True


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
    for shape in chosen:
        _check_input_fits(shape)
    # The cheapest first: forecasts rest on them, and what they leave of their share of the budget
    # goes to the others. Training costs about four times as much as inference.
    groups = sorted(
        ((shape, mode) for shape, modes in options.shapes for mode in modes),
        key=lambda group: math.prod(group[0]) * (4 if group[1] == "training" else 1),
    )
    measured: dict[tuple[Shape, Implementation], dict[Mode, Measurement]] = defaultdict(dict)
    results = Results(
        environment(torch.device(conditions.device)),
        conditions,
        options.baseline,
        options.sweep,
        rows=[],
    )
    with ExitStack() as stack:
        stack.enter_context(conditions.limited_threads())
        memory = None
        if options.memory and conditions.device == "cpu" and CpuMemory.available:
            memory = stack.enter_context(CpuMemory())
        progress = stack.enter_context(_progress(sum(len(chosen[shape]) for shape, _ in groups)))
        run = _Run(options, memory, progress)
        for shape in {shape.channels: shape for shape in chosen}.values():
            run.check_modules(shape)
        for number, (shape, mode) in enumerate(groups, start=1):
            run.start_group(number / len(groups))
            for implementation, found in run.measure(shape, mode, chosen[shape]).items():
                measured[shape, implementation][mode] = found
    results.rows.extend(
        Row(shape, each, run.formulas.get((shape, each), Formula()), measured[shape, each])
        for shape, found in chosen.items()
        for each in found
    )
    return results


def _check_baseline(baseline: str, implementations: list[Implementation]) -> None:
    if not any(each.matches(baseline) for each in implementations):
        automatic = [each.layer for each in implementations if each.automatic]
        names = dict.fromkeys([*(each.name for each in implementations), *automatic])
        raise UsageError(f"expected a baseline of {', '.join(names)}, got {baseline!r}")


def _check_input_fits(shape: Shape) -> None:
    """Raise UsageError where the input and its gradient alone exceed the free memory."""
    needed, free = 2 * 4 * math.prod(shape), available_bytes()
    if free is not None and needed > free:
        raise UsageError(
            f"expected shapes whose input and gradient fit into the {free / 2**30:.1f} GiB of free "
            f"memory, got {shape}, which needs {needed / 2**30:.1f} GiB"
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[float, str], None]]:
    """Show a progress bar in which each row of the table in each mode counts as 1."""
    columns = (
        TextColumn("{task.description:<48}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda part, what: progress.update(task, advance=part, description=what)


class _Run:
    """The state of a run: modules, each built once, and what was learned for forecasts."""

    def __init__(
        self, options: Options, memory: CpuMemory | None, progress: Callable[[float, str], None]
    ) -> None:
        self.options, self.memory, self.progress = options, memory, progress
        self.conditions, self.plan = options.conditions, options.plan
        self.modules: dict[tuple[Implementation, int], nn.Module] = {}
        self.formulas: dict[tuple[Shape, Implementation], Formula] = {}
        # Seconds per FLOP of each implementation and mode, from the last shape.
        self.rates: dict[tuple[Implementation, Mode], float] = {}
        self.start = time.monotonic()
        # In the current group no row is begun after the first, and none is timed after the second.
        self.last_begin = self.last_call = math.inf

    def module(self, implementation: Implementation, channels: int) -> nn.Module:
        """Return the module of a width, built at the first call."""
        key = implementation, channels
        if key not in self.modules:
            self.modules[key] = implementation.build(channels, self.conditions)
        return self.modules[key]

    def check_modules(self, shape: Shape) -> None:
        """Raise UsageError if a user's module cannot be built or returns another shape."""
        small = shape._replace(height=min(shape.height, 16), width=min(shape.width, 12))
        for target in self.options.modules:
            module = self.module(Implementation(target), shape.channels)
            workload = Workload(module, feature_map(small, self.conditions), None)
            workload.prepare("inference")
            try:
                workload.run("inference")
            except ShapeError as error:
                raise UsageError(f"module {target!r}: {error}") from error
            except Exception:  # it may be made for large maps alone, or out of memory
                continue

    def start_group(self, part: float) -> None:
        """End the next group when this part of the budget is used; half of that to begin rows."""
        if self.plan.budget is not None:
            self.last_call = self.start + part * self.plan.budget
            self.last_begin = (time.monotonic() + self.last_call) / 2

    def measure(
        self, shape: Shape, mode: Mode, implementations: Sequence[Implementation]
    ) -> dict[Implementation, Measurement]:
        """Measure all implementations at one shape in one mode."""
        x = feature_map(shape, self.conditions)
        grad = random_like(x, self.conditions.seed) if mode == "training" else None
        workloads: dict[Implementation, Workload] = {}
        recipes: dict[Implementation, LayerRecipe] = {}
        for each in implementations:
            workloads[each] = Workload(self.module(each, shape.channels), x, grad)
            recipes[each] = LayerRecipe(each, shape, self.conditions)

        def admit(each: Implementation) -> float | None:
            self.progress(0, f"{shape} {mode}: {each.name}")
            # A run is made for the official implementation, the first layer and the baseline.
            needed = implementations.index(each) < 2 or each.matches(self.options.baseline)
            return self._forecast(each, shape, mode, workloads[each].module, needed)

        return measure_group(
            workloads,
            recipes,
            mode,
            self.plan,
            self.memory,
            peaks=self.options.memory,
            admit=admit,
            warmed=lambda each, seconds: self._learn(each, shape, mode, seconds),
            step=lambda each, part: self.progress(part, f"{shape} {mode}: {each.name}"),
            last_call=self.last_call,
        )

    def _forecast(
        self, each: Implementation, shape: Shape, mode: Mode, module: nn.Module, needed: bool
    ) -> float | None:
        """Return the seconds of a call where they can be foretold; raise LeftOut to skip it."""
        if (shape, each) not in self.formulas:
            self.formulas[shape, each] = each.formula(module, shape, self.conditions)
        if self.plan.budget is not None and not needed and time.monotonic() > self.last_begin:
            raise LeftOut(Failure.no_time_left(self.plan.budget))
        if each.layer in LAYERS:
            (backend,) = (entry for entry in BACKENDS if entry.name == each.backend)
            if reasons := backend.reasons_against(each.inputs(shape, self.conditions)):
                raise LeftOut(Failure("cannot run", f"{backend.name} {', '.join(reasons)}"))
        flops = self.formulas[shape, each].flops or 0
        forecast = self.rates.get((each, mode), 0) * flops or None
        if forecast is not None and forecast > self.plan.limit:
            raise LeftOut(Failure.too_slow(forecast, self.plan.limit))
        return forecast

    def _learn(self, each: Implementation, shape: Shape, mode: Mode, seconds: float) -> None:
        # A call of less than a tenth of a second may be mostly overhead: its rate is too high.
        if (flops := self.formulas[shape, each].flops) and seconds > 0.1:
            self.rates[each, mode] = seconds / flops
