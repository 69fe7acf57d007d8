"""Every configuration of the attention kernels on a GPU: checked against float64, then timed.

    PYTHONPATH=src python benchmarks/gpu_sweep.py --output out/sweep.json      # on the GPU
    python benchmarks/gpu_sweep.py --take out/sweep.json     # the order becomes the package's

The kernels are compiled by as many processes as there are cores, into Triton's cache. Then each
configuration is launched as the library launches it, for one image whose exact result is known and
for the whole batch, which is timed. It may be stopped anywhere: what was measured is written after
each shape, the most common shape first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from torch import Tensor

from fullattn.attention.triton import kernels, launch, tuning
from fullattn.attention.triton.configurations import CLASSES, Configuration, features_class
from fullattn.functional import columns_and_rows
from gpu_checks import SHAPES, TINY, Shape

KERNELS = ("forward", "backward_queries", "backward_keys")
# Products of (C, D) with (D, C) or (C, C) with (C, D) that each kernel computes, and that are
# needed: the map and its gradient are computed again.
# Each is computed for the rows; the columns' queries find their result kept, and take 2 fewer.
PRODUCTS = {"forward": 2, "backward_queries": 5, "backward_keys": 4}
TOLERANCE = 5e-2
CONFIGURATIONS = Path(kernels.__file__).with_name("configurations.json")


def grid(kernel: str, features: int) -> Iterator[Configuration]:
    """Every configuration that is worth a try."""
    padded = -(-features // 16) * 16
    totals = {box: sum(kernels.widths(padded, box)) for box in (128, 64, 32)}
    boxes = [box for box in (128, 64) if box / 2 < padded and totals[box] < 1.4 * padded]
    # Narrow boxes are slower, where they do not save anything.
    boxes += [32] if not boxes or totals[32] < totals[64] else []
    if features > 128:
        blocks = [(64, 32, 8), (64, 64, 8), (128, 32, 8), (128, 64, 8), (64, 32, 4), (64, 64, 4)]
    elif kernel == "forward":
        blocks = [(64, 64, 4), (128, 64, 8), (128, 64, 4), (64, 128, 4)]
    elif kernel == "backward_queries":
        blocks = [(64, 64, 4), (128, 64, 8), (128, 32, 8), (64, 128, 4), (64, 32, 4)]
    else:
        blocks = [(64, 64, 4), (64, 32, 4), (128, 64, 8), (128, 32, 8)]
    for (m, n, warps), box, stages in itertools.product(blocks, boxes, (2, 3)):
        yield Configuration(m, n, box, warps, stages)
        # So few that a program more runs at once on a multiprocessor.
        if kernel != "backward_keys" and features <= 128 and (n, m // warps) == (64, 16):
            yield Configuration(m, n, box, warps, stages, 128)
        if kernel == "backward_keys" and features <= 128 and m == 64:
            yield Configuration(m, n, box, warps, stages, 168)


@dataclass
class Problem:
    """A forward and a backward, with every launch of attention in it by kernel and branch."""

    inputs: tuple[Tensor, ...]
    grad: Tensor
    launches: dict[tuple[str, int], launch.Launch]

    @classmethod
    def of(cls, shape: Shape, device: str, run: Callable[[launch.Launch], None]) -> Problem:
        """Draw the inputs, and run both."""
        batch, channels, height, width = shape
        dtype = torch.float32 if tuning.INTERPRETED else torch.bfloat16
        x, grad = (
            torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
            for _ in range(2)
        )
        column_key = torch.randn(batch, height, channels, device=device).to(dtype).mT
        row_key = torch.randn(batch, width, channels, device=device).to(dtype).mT
        inputs = (x, column_key, row_key, torch.full((1,), 0.7, device=device, dtype=dtype))
        found: list[launch.Launch] = []

        def keep(each: launch.Launch) -> None:
            found.append(each)
            run(each)

        scale = 0.5 / max(height, width) ** 0.5
        _, *kept = launch.forward(*inputs, scale, True, "ieee", keep)
        launch.backward(grad, *inputs, *kept, scale, "ieee", keep)
        attention = [each for each in found if each.slices]
        return cls(
            inputs,
            grad,
            {
                (kernel, branch): each
                for kernel in KERNELS
                for branch, each in enumerate(e for e in attention if e.kernel == kernel)
            },
        )


def error(problem: Problem, exact: list[Tensor], kernel: str, entry: Configuration) -> float:
    """Return the largest relative error of the results with a kernel in one configuration."""

    def run(each: launch.Launch) -> None:
        if each.kernel == kernel:
            tuning.launch(each, entry)
        else:
            tuning.run(each)

    scale = 0.5 / max(problem.inputs[0].shape[2:]) ** 0.5
    # What a kernel does not write stays NaN.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        y, *kept = launch.forward(*problem.inputs, scale, True, "ieee", run)
        found = [y, *launch.backward(problem.grad, *problem.inputs, *kept, scale, "ieee", run)]
    finally:
        torch.use_deterministic_algorithms(False)
    errors = [
        ((one.double() - other).norm() / other.norm()).item()
        for one, other in zip(found, exact, strict=True)
    ]
    return max(errors) if all(each == each for each in errors) else float("nan")


def exactly(problem: Problem) -> list[Tensor]:
    """Compute the result and every gradient in float64."""
    inputs = [each.double().requires_grad_() for each in problem.inputs]
    x, column_key, row_key, gamma = inputs
    scale = 0.5 / max(x.shape[2:]) ** 0.5
    y = gamma * columns_and_rows(x, column_key, row_key, scale) + x
    return [y.detach(), *torch.autograd.grad(y, inputs, problem.grad.double())]


# Compiling, in other processes.

_compiled: dict[tuple[Shape, str], Problem] = {}


def compile_entry(shape: Shape, device: str, kernel: str, entry: Configuration) -> str | None:
    """Compile a kernel for both branches into Triton's cache; says what went wrong."""
    try:
        if (shape, device) not in _compiled:
            _compiled[shape, device] = Problem.of(shape, device, lambda each: None)
        for branch in range(2):
            each = _compiled[shape, device].launches[kernel, branch]
            named = tuning.named_arguments(each, entry)
            getattr(kernels, kernel).warmup(grid=(1,), **named, **entry.options)
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"[:160]
    return None


@dataclass
class Row:
    """A configuration of a kernel, for the slices of one branch."""

    shape: Shape
    kernel: str
    features: int
    configuration: dict[str, Any]
    milliseconds: float | None
    flops_per_second: float | None
    error: float | None
    reason: str | None = None


def median_ms(call: Callable[[], object], device: str) -> float:
    """Median time of a call, in milliseconds."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    call()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU waits for 0.5 ms, in which the host gets ahead: a launch takes it longer than
        # some kernels run.
        torch.cuda._sleep(900_000)
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)


def sweep(
    shapes: list[Shape],
    device: str,
    until: float,
    chosen: Callable[[str, int], list[Configuration]],
) -> Iterator[list[Row]]:
    """Group the rows by shape."""
    context = multiprocessing.get_context("spawn")
    pool = (
        None if device == "cpu" else ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 3), context)
    )
    for shape in shapes:
        entries = {
            (kernel, entry): None
            for kernel in KERNELS
            for features in dict.fromkeys(shape[2:])
            for entry in chosen(kernel, features)
        }
        jobs = (
            {key: pool.submit(compile_entry, shape, device, *key) for key in entries}
            if pool
            else {}
        )
        one = Problem.of((1, *shape[1:]), device, tuning.run)
        exact = exactly(one)
        whole = Problem.of(shape, device, tuning.run)
        rows: list[Row] = []
        for kernel, entry in entries:
            if time.monotonic() > until:
                break
            reason = jobs[kernel, entry].result() if jobs else None
            wrong = None
            if reason is None:
                try:
                    wrong = error(one, exact, kernel, entry)
                    if not wrong < TOLERANCE:
                        reason = "wrong"
                except Exception as problem:
                    reason = f"{type(problem).__name__}: {problem}"[:160]
            for branch in range(2):
                each = whole.launches[kernel, branch]
                batch, count, features, tokens = each.slices["x"].shape
                row = Row(shape, kernel, features, asdict(entry), None, None, wrong, reason)
                rows.append(row)
                if reason is None:
                    row.milliseconds = median_ms(
                        functools.partial(tuning.launch, each, entry), device
                    )
                    flops = PRODUCTS[kernel] * 2 * tokens**2 * features * batch * count
                    row.flops_per_second = flops / row.milliseconds * 1e3
        yield rows
        del one, exact, whole
        if device == "cuda":
            torch.cuda.empty_cache()
    if pool:
        pool.shutdown(cancel_futures=True)


def ranking(rows: list[Row]) -> dict[tuple[str, int], list[tuple[float, dict[str, Any]]]]:
    """For each kernel and class of features the configurations, the fastest first.

    A class may have been measured at several shapes: the mean of the times over the best of each.
    """
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row.milliseconds is not None:
            key = (row.shape, row.kernel, row.features)
            best[key] = min(best.get(key, row.milliseconds), row.milliseconds)
    ratios: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        if row.milliseconds is not None:
            of_class = ratios.setdefault((row.kernel, features_class(row.features)), {})
            ratio = row.milliseconds / best[row.shape, row.kernel, row.features]
            of_class.setdefault(json.dumps(row.configuration), []).append(ratio)
    ranked = {}
    for key, found in ratios.items():
        most = max(map(len, found.values()))
        means = [(statistics.mean(r), json.loads(c)) for c, r in found.items() if len(r) == most]
        ranked[key] = sorted(means, key=lambda each: each[0])
    return ranked


def take(path: Path, into: Path, keep: int = 3) -> None:
    """Write the order that was measured into a table of configurations."""
    rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
    for row in rows:
        row.shape = tuple(row.shape)
    table = json.loads(into.read_text())
    for (kernel, features), ranked in ranking(rows).items():
        entries = [
            {name: value for name, value in each.items() if value is not None}
            for _, each in ranked[:keep]
        ]
        table["Hopper"]["half"][kernel][str(features)] = entries
    text = json.dumps(table, indent=1)
    # One configuration a line.
    text = re.sub(r"{\s+(\"block_m[^}]*?)\s+}", lambda m: f"{{{' '.join(m[1].split())}}}", text)
    into.write_text(text + "\n")


def main() -> int:
    """Sweep, or take a sweep over."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for every measurement")
    parser.add_argument("--take", type=Path, help="write the order of a sweep into the package")
    parser.add_argument("--rehearse", action="store_true", help="tiny maps, interpreted, no GPU")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds in all (150)")
    parser.add_argument("--table", type=Path, default=CONFIGURATIONS, help="where --take writes")
    args = parser.parse_args()
    if args.take is not None:
        take(args.take, args.table)
        return 0
    if args.output is None:
        parser.error("expected --output or --take")
    if not args.rehearse and not torch.cuda.is_available():
        print("there is no CUDA device here; --rehearse runs the script without one")
        return 2
    device = "cpu" if args.rehearse else "cuda"
    until = time.monotonic() + args.budget
    chosen = lambda kernel, features: list(grid(kernel, features))  # noqa: E731
    if args.rehearse:
        chosen = lambda kernel, features: [Configuration(16, 16, 16, 4, 2)]  # noqa: E731
    rows: list[Row] = []
    start = time.monotonic()
    for found in sweep(TINY if args.rehearse else SHAPES, device, until, chosen):
        rows += found
        args.output.write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
        shape = found[0].shape if found else None
        print(f"{time.monotonic() - start:.0f} s: {shape}, {len(found)} rows", flush=True)
    failed = [row for row in rows if row.reason is not None]
    for reason, row in {str(row.reason)[:40]: row for row in failed}.items():
        print(row.kernel, row.shape, row.configuration, reason)
    for shape in dict.fromkeys(row.shape for row in rows):
        of_shape = [row for row in rows if row.shape == shape and row.milliseconds is not None]
        for kernel, features in dict.fromkeys((row.kernel, row.features) for row in of_shape):
            for branch in range(2):
                found = [r for r in of_shape if (r.kernel, r.features) == (kernel, features)]
                found = found[branch::2] if shape[2] == shape[3] else found
                for row in sorted(found, key=lambda r: r.milliseconds)[:2]:
                    entry = Configuration(**row.configuration)
                    print(
                        f"{'x'.join(map(str, shape))} {kernel} D={features} "
                        f"{('columns', 'rows')[branch]}: {row.milliseconds:.4f} ms, "
                        f"{row.flops_per_second / 1e12:.0f} TFLOP/s, {entry}"
                    )
                if shape[2] != shape[3]:
                    break
    print(f"{len(rows)} rows, {len(failed)} failed; {CLASSES[-1]} features at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
