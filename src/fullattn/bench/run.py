"""One run: every contender at every shape, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from fullattn.attention.dispatch import BACKENDS
from fullattn.bench import compare, plot
from fullattn.bench.conditions import Conditions, environment
from fullattn.bench.contenders import LAYERS, PUBLIC, Contender, contenders_at, problem_of
from fullattn.bench.contenders import build as build_module
from fullattn.bench.errors import UsageError
from fullattn.bench.failures import Failure
from fullattn.bench.formula import formula
from fullattn.bench.inputs import check_image, feature_map, random_like
from fullattn.bench.measure import Plan, clock_for, take_turns, warm_up
from fullattn.bench.memory import CpuMemory, cuda_peak
from fullattn.bench.output import output_folder, write_all
from fullattn.bench.report import Formula, Measurement, Report, Row
from fullattn.bench.shapes import Shape
from fullattn.bench.table import print_report
from fullattn.bench.workload import Mode, ShapeError, Workload

__all__ = ["Options", "bench", "measure_all"]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        shapes: each with the modes to measure at it.
        conditions: what all contenders have in common.
        layers: keys of `LAYERS`.
        backends: names of backends, or "default", "auto", "all".
        users: where users' classes are.
        baseline: the contender that ratios refer to.
        sweep: "resolution" or "channels" if the shapes are a sweep, for the picture.
        plan: how often to time a call.
        memory: whether to measure peak memory.
    """

    shapes: Sequence[tuple[Shape, tuple[Mode, ...]]]
    conditions: Conditions
    layers: Sequence[str] = tuple(LAYERS)
    backends: Sequence[str] = ("default",)
    users: Sequence[str] = ()
    baseline: str = PUBLIC
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
                    picture: lambda path: plot.draw(report, path),
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
    device = torch.device(conditions.device)
    rounds = [
        (
            shape,
            modes,
            contenders_at(
                shape,
                conditions,
                layers=options.layers,
                backends=options.backends,
                users=options.users,
            ),
        )
        for shape, modes in options.shapes
    ]
    _check_baseline(options.baseline, [c for _, _, contenders in rounds for c in contenders])
    for target in options.users:
        _check_user(target, options.shapes[0][0], conditions)

    report = _empty_report(options)
    threads = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    try:
        with ExitStack() as stack:
            memory = None
            if options.memory and device.type == "cpu" and CpuMemory.available:
                memory = stack.enter_context(CpuMemory())
            total = sum(len(contenders) * len(modes) for _, modes, contenders in rounds)
            progress = stack.enter_context(_progress(total))
            runner = _Runner(options, memory, progress)
            for shape, modes, contenders in rounds:
                report.rows.extend(runner.rows(shape, modes, contenders))
    finally:
        torch.set_num_threads(threads)
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
        # Seconds per FLOP of each contender and mode, from the last shape.
        self.rates: dict[tuple[str, Mode], float] = {}
        self.start = time.monotonic()

    def rows(self, shape: Shape, modes: Sequence[Mode], contenders: list[Contender]) -> list[Row]:
        conditions = self.options.conditions
        x = feature_map(shape, conditions)
        grad = random_like(x, conditions.seed) if "training" in modes else None
        workloads, formulas = {}, {}
        for contender in contenders:
            module = build_module(contender, shape.channels, conditions)
            formulas[contender.name] = formula(contender, module, shape, conditions)
            workloads[contender.name] = Workload(module, x, grad)
        measured: dict[str, dict[Mode, Measurement]] = {c.name: {} for c in contenders}
        for mode in modes:
            results = self._measure(shape, mode, contenders, workloads, formulas)
            for name, measurement in results.items():
                measured[name][mode] = measurement
        return [Row(shape, c, formulas[c.name], measured[c.name]) for c in contenders]

    def _measure(
        self,
        shape: Shape,
        mode: Mode,
        contenders: list[Contender],
        workloads: dict[str, Workload],
        formulas: dict[str, Formula],
    ) -> dict[str, Measurement]:
        plan = self.options.plan
        failures: dict[str, Failure] = {}
        peaks: dict[str, int] = {}
        calls: dict[str, int] = {}
        for contender in contenders:
            name = contender.name
            self.bar.add(0, f"{shape} {mode}: {name}")
            try:
                if plan.budget is not None and self._out_of_time():
                    raise _LeftOutError(Failure.no_time_left(plan.budget))
                flops = formulas[name].flops
                forecast = self._forecast(contender, shape, mode, flops)
                if self.memory is not None:
                    probe = self.memory.probe(
                        contender, shape, self.options.conditions, mode, plan.limit
                    )
                    if isinstance(probe, Failure):
                        raise _LeftOutError(probe)
                    peaks[name], forecast = probe.peak_bytes, probe.seconds
                seconds = warm_up(workloads[name], mode, self.clock, forecast)
                if seconds > plan.limit:
                    raise _LeftOutError(Failure.too_slow(None, plan.limit))
                if self.options.memory and self.device.type == "cuda":
                    peaks[name] = cuda_peak(workloads[name], mode)
                calls[name] = plan.calls(seconds)
                self._learn(name, mode, flops, seconds)
            except _LeftOutError as left:
                failures[name] = left.failure
            except Exception as error:
                failures[name] = Failure.of(error)
            if name in failures:
                # Nothing of an error's traceback may keep tensors alive.
                workloads[name].prepare(mode)
                self.bar.add(1, f"{shape} {mode}: {name}")
            else:
                self.bar.add(0.25, f"{shape} {mode}: {name}")
        times, failed = take_turns(
            {name: workloads[name] for name in calls},
            calls,
            mode,
            self.clock,
            step=lambda name: self.bar.add(0.75 / calls[name], f"{shape} {mode}: taking turns"),
            enough=self._is_enough,
        )
        failures |= failed
        return {
            name: Measurement(times.get(name, []), peaks.get(name), failures.get(name))
            for name in workloads
        }

    def _is_enough(self, times_ms: list[float]) -> bool:
        if self.options.plan.repeats is not None:
            return False
        return self._out_of_time() or sum(times_ms) > self.options.plan.limit * 1e3

    def _out_of_time(self) -> bool:
        budget = self.options.plan.budget
        return budget is not None and time.monotonic() - self.start > budget

    def _forecast(
        self, contender: Contender, shape: Shape, mode: Mode, flops: int | None
    ) -> float | None:
        """Seconds of a call where they can be foretold; _LeftOutError where it cannot run."""
        if contender.layer in LAYERS:
            dtype = getattr(torch, self.options.conditions.dtype)
            problem = problem_of(contender.layer, shape, dtype, self.device.type)
            backend = next(entry for entry in BACKENDS if entry.name == contender.backend)
            if reasons := backend.reasons_against(problem):
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
