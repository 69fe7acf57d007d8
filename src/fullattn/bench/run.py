"""One run: every contender at every shape, measured in turns."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fullattn._cli.conditions import Conditions, Mode, available_bytes, environment
from fullattn._cli.errors import UsageError
from fullattn._cli.inputs import check_image, feature_map, random_like
from fullattn._cli.output import output_folder, write_all
from fullattn._cli.shapes import Shape
from fullattn.attention.dispatch import BACKENDS
from fullattn.bench import chart, compare
from fullattn.bench.failures import Failure
from fullattn.bench.formula import formula
from fullattn.bench.implementations import (
    OFFICIAL,
    Contender,
    build,
    contenders_at,
    inputs_of,
)
from fullattn.bench.measure import Plan, clock_for, take_turns, warm_up
from fullattn.bench.memory import CpuMemory, cuda_peak
from fullattn.bench.results import Formula, Measurement, Report, Row
from fullattn.bench.table import print_report
from fullattn.bench.workload import ShapeError, Workload
from fullattn.layers import LAYERS

__all__ = ["Options", "bench", "measure_all"]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        shapes: each with the modes to measure at it.
        conditions: what all contenders have in common.
        layers: names of registered layers; all of them if there are none.
        backends: names of backends, or "default", "auto", "all".
        users: where users' classes are.
        baseline: the contender that ratios refer to.
        sweep: "resolution" or "channels" if the shapes are a sweep, for the picture.
        plan: how often to time a call.
        memory: whether to measure peak memory.
    """

    shapes: Sequence[tuple[Shape, tuple[Mode, ...]]]
    conditions: Conditions
    layers: Sequence[str] = ()
    backends: Sequence[str] = ("default",)
    users: Sequence[str] = ()
    baseline: str = OFFICIAL
    sweep: str | None = None
    plan: Plan = field(default_factory=Plan)
    memory: bool = True


def bench(options: Options, folder: Path, old: Report | None, console: Console) -> Report:
    """Measure, print the tables, write the JSON and the picture.

    Args:
        options: what to run.
        folder: where the files go.
        old: an earlier run to compare with.
        console: where the tables go; the progress bar goes to standard error.

    Returns:
        The report.

    Raises:
        UsageError: an option does not fit; nothing is written then.
    """
    if old is not None:
        compare.check_comparable(old, _empty_report(options))
    if options.conditions.image is not None:
        check_image(options.conditions.image)
    name = "sweep" if options.sweep else "bench"
    with output_folder(folder):
        data, picture = folder / f"{name}.json", folder / f"{name}.png"
        report = measure_all(options)
        try:
            write_all(
                {
                    data: lambda path: path.write_text(report.to_json(), encoding="utf-8"),
                    picture: lambda path: chart.draw(report, path),
                }
            )
        except OSError as error:
            raise UsageError(f"cannot write to {str(folder)!r}: {error.strerror}") from error
    print_report(report, console)
    if old is not None:
        compare.print_changes(old, report, console)
    console.print(f"\n{data}\n{picture}", highlight=False, markup=False, soft_wrap=True)
    return report


def measure_all(options: Options) -> Report:
    """Measure every contender at every shape.

    Args:
        options: what to run.

    Returns:
        The report.

    Raises:
        UsageError: a contender or the baseline is not there, or a contender returns another shape.
    """
    conditions = options.conditions
    contenders = {
        shape: contenders_at(
            shape,
            conditions,
            layers=options.layers or tuple(LAYERS),
            backends=options.backends,
            users=options.users,
        )
        for shape, _ in options.shapes
    }
    _check_baseline(options.baseline, [c for found in contenders.values() for c in found])
    for shape in {shape.channels: shape for shape in contenders}.values():
        for target in options.users:
            _check_user(target, shape, conditions)
    for shape in contenders:
        _check_input_fits(shape)

    # The cheapest first: forecasts rest on them, and what they leave of their share of the budget
    # goes to the others. Training costs about four times as much as inference.
    groups = sorted(
        ((shape, mode) for shape, modes in options.shapes for mode in modes),
        key=lambda group: math.prod(group[0]) * (4 if group[1] == "training" else 1),
    )
    measured: dict[tuple[Shape, str], dict[Mode, Measurement]] = defaultdict(dict)
    report = _empty_report(options)
    threads = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    try:
        with ExitStack() as stack:
            memory = None
            if options.memory and conditions.device == "cpu" and CpuMemory.available:
                memory = stack.enter_context(CpuMemory())
            bar = stack.enter_context(_progress(sum(len(contenders[shape]) for shape, _ in groups)))
            runner = _Runner(options, memory, bar)
            for number, (shape, mode) in enumerate(groups, start=1):
                runner.share(number / len(groups))
                for name, measurement in runner.measure(shape, mode, contenders[shape]).items():
                    measured[shape, name][mode] = measurement
    finally:
        torch.set_num_threads(threads)
    report.rows.extend(
        Row(shape, c, runner.formulas.get((shape, c.name), Formula()), measured[shape, c.name])
        for shape, found in contenders.items()
        for c in found
    )
    return report


def _empty_report(options: Options) -> Report:
    here = environment(torch.device(options.conditions.device))
    return Report(here, options.conditions, options.baseline, options.sweep, rows=[])


def _check_baseline(baseline: str, contenders: list[Contender]) -> None:
    if not any(contender.answers_to(baseline) for contender in contenders):
        automatic = [c.layer for c in contenders if c.automatic]
        names = dict.fromkeys([*(c.name for c in contenders), *automatic])
        raise UsageError(f"expected a baseline of {', '.join(names)}, got {baseline!r}")


def _check_user(target: str, shape: Shape, conditions: Conditions) -> None:
    small = shape._replace(height=min(shape.height, 16), width=min(shape.width, 12))
    workload = Workload.of(Contender(target), small, conditions, "inference")
    workload.prepare("inference")
    try:
        workload.run("inference")
    except ShapeError as error:
        raise UsageError(f"contender {target!r}: {error}") from error
    except Exception:
        # It may be made for large maps alone, or out of memory; its row will tell.
        return


def _check_input_fits(shape: Shape) -> None:
    """Raise UsageError where the input and its gradient alone exceed the free memory."""
    needed, free = 2 * 4 * math.prod(shape), available_bytes()
    if free is not None and needed > free:
        raise UsageError(
            f"expected shapes whose input and gradient fit into the {free / 2**30:.1f} GiB of free "
            f"memory, got {shape}, which needs {needed / 2**30:.1f} GiB"
        )


class _Bar:
    """A progress bar in rows: each row of the table in each mode counts as 1."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def add(self, part: float, what: str) -> None:
        self._progress.update(self._task, advance=part, description=what)


@contextmanager
def _progress(total: int) -> Iterator[_Bar]:
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
        yield _Bar(progress, total)


class _Runner:
    """Measures one shape after the other, and learns from each how long the next will take."""

    def __init__(self, options: Options, memory: CpuMemory | None, bar: _Bar) -> None:
        self.options, self.memory, self.bar = options, memory, bar
        self.device = torch.device(options.conditions.device)
        self.clock = clock_for(self.device)
        self.formulas: dict[tuple[Shape, str], Formula] = {}
        # Seconds per FLOP of each contender and mode, from the last shape.
        self.rates: dict[tuple[str, Mode], float] = {}
        self.start = time.monotonic()
        # Of the group at hand: when no contender is begun any more, and when no turn is.
        self.last_begin = self.last_turn = math.inf

    def share(self, part: float) -> None:
        """End the next group when so large a part of the budget is used; half of that to begin."""
        if self.options.plan.budget is not None:
            self.last_turn = self.start + part * self.options.plan.budget
            self.last_begin = (time.monotonic() + self.last_turn) / 2

    def measure(
        self, shape: Shape, mode: Mode, contenders: Sequence[Contender]
    ) -> dict[str, Measurement]:
        """Measure all contenders at one shape in one mode; by contender's name."""
        conditions = self.options.conditions
        x = feature_map(shape, conditions)
        grad = random_like(x, conditions.seed) if mode == "training" else None
        workloads: dict[str, Workload] = {}
        calls: dict[str, int] = {}
        peaks: dict[str, int] = {}
        failures: dict[str, Failure] = {}
        for number, contender in enumerate(contenders):
            name, label = contender.name, f"{shape} {mode}: {contender.name}"
            self.bar.add(0, label)
            try:
                workload = Workload(build(contender, shape.channels, conditions), x, grad)
                # A run is made for the official implementation, the first layer and the baseline.
                needed = number < 2 or contender.answers_to(self.options.baseline)
                seconds, peak = self._first_calls(contender, shape, mode, workload, needed)
            except _LeftOutError as left:
                failures[name] = left.failure
            except Exception as error:
                failures[name] = Failure.of(error)
            else:
                workloads[name], calls[name] = workload, self.options.plan.calls(seconds)
                if peak is not None:
                    peaks[name] = peak
            self.bar.add(1 if name in failures else 0.25, label)
        times, failed = take_turns(
            workloads,
            calls,
            mode,
            self.clock,
            step=lambda name: self.bar.add(0.75 / calls[name], f"{shape} {mode}: taking turns"),
            enough=self._is_enough,
        )
        failures |= failed
        return {
            name: Measurement(times.get(name, []), peaks.get(name), failures.get(name))
            for name in (contender.name for contender in contenders)
        }

    def _first_calls(
        self, contender: Contender, shape: Shape, mode: Mode, workload: Workload, needed: bool
    ) -> tuple[float, int | None]:
        """Formula, peak memory and warm-up; returns seconds of a call and the peak."""
        name, plan, conditions = contender.name, self.options.plan, self.options.conditions
        if (shape, name) not in self.formulas:
            self.formulas[shape, name] = formula(contender, workload.module, shape, conditions)
        flops = self.formulas[shape, name].flops
        if plan.budget is not None and not needed and time.monotonic() > self.last_begin:
            raise _LeftOutError(Failure.no_time_left(plan.budget))
        forecast = self._forecast(contender, shape, mode, flops)
        peak = None
        if self.memory is not None:
            probe = self.memory.probe(contender, shape, conditions, mode, plan.limit)
            if isinstance(probe, Failure):
                raise _LeftOutError(probe)
            peak, forecast = probe.peak_bytes, probe.seconds
        seconds = warm_up(workload, mode, self.clock, forecast)
        if seconds > plan.limit:
            raise _LeftOutError(Failure.too_slow(None, plan.limit))
        if self.options.memory and self.device.type == "cuda":
            peak = cuda_peak(workload, mode)
        self._learn(name, mode, flops, seconds)
        return seconds, peak

    def _is_enough(self, times_ms: list[float]) -> bool:
        if self.options.plan.repeats is not None:
            return False
        spent = sum(times_ms) / 1e3
        return time.monotonic() > self.last_turn or spent > self.options.plan.limit

    def _forecast(
        self, contender: Contender, shape: Shape, mode: Mode, flops: int | None
    ) -> float | None:
        """Seconds of a call where they can be foretold; _LeftOutError where it cannot run."""
        if contender.layer in LAYERS:
            dtype = getattr(torch, self.options.conditions.dtype)
            inputs = inputs_of(contender.layer, shape, dtype, self.device.type)
            backend = next(entry for entry in BACKENDS if entry.name == contender.backend)
            if reasons := backend.reasons_against(inputs):
                raise _LeftOutError(Failure("cannot run", f"{backend.name} {', '.join(reasons)}"))
        rate = self.rates.get((contender.name, mode))
        if rate is None or flops is None:
            return None
        if rate * flops > self.options.plan.limit:
            raise _LeftOutError(Failure.too_slow(rate * flops, self.options.plan.limit))
        return rate * flops

    def _learn(self, name: str, mode: Mode, flops: int | None, seconds: float) -> None:
        # A call of less than a tenth of a second may be mostly overhead, and foretells too much.
        if flops and seconds > 0.1:
            self.rates[name, mode] = seconds / flops


class _LeftOutError(Exception):
    """A row is left out, for the reason given."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure
