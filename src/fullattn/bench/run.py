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
from fullattn.bench.implementations import OFFICIAL, Formula, Implementation, implementations_at
from fullattn.bench.measure import Failure, Plan, clock_for, interleave, warm_up
from fullattn.bench.memory import CpuMemory, cuda_peak
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
        self.clock = clock_for(torch.device(options.conditions.device))
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
        calls: dict[Implementation, int] = {}
        peaks: dict[Implementation, int | None] = {}
        failures: dict[Implementation, Failure] = {}
        for number, each in enumerate(implementations):
            label = f"{shape} {mode}: {each.name}"
            self.progress(0, label)
            # A run is made for the official implementation, the first layer and the baseline.
            needed = number < 2 or each.matches(self.options.baseline)
            try:
                workload = Workload(self.module(each, shape.channels), x, grad)
                seconds, peaks[each] = self._first_calls(each, shape, mode, workload, needed)
                workloads[each], calls[each] = workload, self.plan.calls(seconds)
            except _LeftOut as left:
                failures[each] = left.failure
            except Exception as error:
                failures[each] = Failure.of(error)
            self.progress(1 if each in failures else 0.25, label)
        label = f"{shape} {mode}: timing"
        times, failed = interleave(
            workloads,
            calls,
            mode,
            self.clock,
            step=lambda each: self.progress(0.75 / calls[each], label),
            enough=self._is_enough,
        )
        failures |= failed
        return {
            each: Measurement(times.get(each, []), peaks.get(each), failures.get(each))
            for each in implementations
        }

    def _first_calls(
        self, each: Implementation, shape: Shape, mode: Mode, workload: Workload, needed: bool
    ) -> tuple[float, int | None]:
        """Compute the formula, measure the peak, warm up; return seconds of a call and the peak."""
        if (shape, each) not in self.formulas:
            formula = each.formula(workload.module, shape, self.conditions)
            self.formulas[shape, each] = formula
        flops = self.formulas[shape, each].flops or 0
        if self.plan.budget is not None and not needed and time.monotonic() > self.last_begin:
            raise _LeftOut(Failure.no_time_left(self.plan.budget))
        if each.layer in LAYERS:
            (backend,) = (entry for entry in BACKENDS if entry.name == each.backend)
            if reasons := backend.reasons_against(each.inputs(shape, self.conditions)):
                raise _LeftOut(Failure("cannot run", f"{backend.name} {', '.join(reasons)}"))
        forecast = self.rates.get((each, mode), 0) * flops or None
        if forecast is not None and forecast > self.plan.limit:
            raise _LeftOut(Failure.too_slow(forecast, self.plan.limit))
        peak = None
        if self.memory is not None:
            recipe = LayerRecipe(each, shape, self.conditions)
            probe = self.memory.probe(recipe, mode, self.plan.limit)
            if isinstance(probe, Failure):
                raise _LeftOut(probe)
            peak, forecast = probe.peak_bytes, probe.seconds
        seconds = warm_up(workload, mode, self.clock, forecast)
        if seconds > self.plan.limit:
            raise _LeftOut(Failure.too_slow(None, self.plan.limit))
        if self.options.memory and self.conditions.device_type == "cuda":
            peak = cuda_peak(workload, mode)
        # A call of less than a tenth of a second may be mostly overhead: its rate is too high.
        if flops and seconds > 0.1:
            self.rates[each, mode] = seconds / flops
        return seconds, peak

    def _is_enough(self, times_ms: list[float]) -> bool:
        if self.plan.repeats is not None:
            return False
        return time.monotonic() > self.last_call or sum(times_ms) / 1e3 > self.plan.limit


class _LeftOut(Exception):  # noqa: N818
    """A row is not measured, for the reason given."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure
