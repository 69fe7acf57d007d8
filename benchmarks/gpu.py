"""The Triton kernels on a GPU: checked against float64, then timed against what else there is.

    PYTHONPATH=src python benchmarks/gpu.py --output out/gpu         # on the GPU
    python benchmarks/gpu.py --rehearse --output out/rehearsal       # anywhere, for no figures
    python benchmarks/gpu.py --output out/gpu --shapes 8x512x96x96 --implementations official triton

Every kernel is checked first; nothing is timed if one is wrong. Then for each shape, memory format
and mode all implementations are interleaved: the official block, the same under `torch.compile`,
our layer on each of PyTorch's fused kernels (on turned slices, the turning counted), our layer on
the Triton kernels, and the compression layers built and fused. Two ceilings are measured in the
same run: a large bfloat16 matrix product and a large copy. The run may stop anywhere: results are
written after each group, the most important first.

Three times are taken. `gpu_ms` is that of the GPU alone: it waits for some milliseconds first, in
which the host gets ahead. `host_ms` is what a call takes the host, where nothing waits for the GPU.
`graph_ms` is the time under a CUDA graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
# Inductor would move Triton's cache, in which our kernels are, when it first compiles.
os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal, costs
from fullattn._cli.conditions import MODES, Mode, environment
from fullattn.attention import triton
from fullattn.bench.memory import cuda_peak
from fullattn.bench.official import OfficialFLANetBlock
from fullattn.bench.results import Failure
from fullattn.bench.workload import Workload
from gpu_checks import (
    DTYPES,
    FORMATS,
    SHAPES,
    TINY,
    Shape,
    check_bit_equal,
    checks,
    compile_all,
)

OFFICIAL, COMPILED, OURS = "official", "official, torch.compile", "fully, triton"
BASE, ODD = SHAPES[0], SHAPES[1]


class OnKernel(nn.Module):
    """A layer whose `scaled_dot_product_attention` may use one kernel alone."""

    def __init__(self, layer: nn.Module, kernel: SDPBackend) -> None:
        super().__init__()
        self.layer, self.kernel = layer, kernel

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        with sdpa_kernel(self.kernel):
            y: Tensor = self.layer(x)
        return y


def implementations(channels: int, *, rehearsal: bool) -> dict[str, Callable[[], nn.Module]]:
    """Every module to be timed, by name."""

    def fully(backend: str) -> nn.Module:
        return FullyAttentional(channels, project=False, gamma_init=0.5, backend=backend)

    def official() -> nn.Module:
        module = OfficialFLANetBlock(channels)
        nn.init.constant_(module.gamma, 0.5)
        return module

    compiler = "aot_eager" if rehearsal else "inductor"
    return {
        OFFICIAL: official,
        OURS: lambda: fully("triton"),
        COMPILED: lambda: torch.compile(official(), backend=compiler),
        "fully, sdpa cuDNN": lambda: OnKernel(fully("sdpa"), SDPBackend.CUDNN_ATTENTION),
        "fully, sdpa flash": lambda: OnKernel(fully("sdpa"), SDPBackend.FLASH_ATTENTION),
        "fully, sdpa efficient": lambda: OnKernel(fully("sdpa"), SDPBackend.EFFICIENT_ATTENTION),
        "channel, built": lambda: ChannelNonLocal(channels, gamma_init=0.5, backend="reference"),
        "channel, fused": lambda: ChannelNonLocal(channels, gamma_init=0.5, backend="sdpa"),
        "spatial, built": lambda: SpatialNonLocal(channels, zero_init=False, backend="reference"),
        "spatial, fused": lambda: SpatialNonLocal(channels, zero_init=False, backend="sdpa"),
    }


def useful_flops(name: str, shape: Shape, mode: Mode) -> int:
    """FLOPs of the layer without what a backend computes again, after `fullattn.costs`."""
    channels = shape[1]
    layers: dict[str, nn.Module] = {
        "channel": ChannelNonLocal(channels, device="meta"),
        "spatial": SpatialNonLocal(channels, device="meta"),
    }
    layer = layers.get(name.partition(",")[0])
    if layer is None:
        layer = FullyAttentional(channels, project=False, device="meta")
    cost = costs.cost(layer, shape, backend="reference")
    return cost.flops + (cost.backward_flops if mode == "training" else 0)


# Speed.


@dataclass
class Row:
    """One implementation at one shape, dtype, memory format and mode; None: no figure."""

    implementation: str
    shape: Shape
    dtype: str
    memory_format: str
    mode: Mode
    milliseconds: list[float] = field(default_factory=list)
    gpu_ms: float | None = None
    host_ms: float | None = None
    graph_ms: float | None = None
    peak_bytes: int | None = None
    useful_flops: int = 0
    share_of_product: float | None = None
    share_of_copy: float | None = None
    reason: str | None = None


class Timer:
    """Times of calls on the GPU; in a rehearsal on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.rounds = 11 if self.cuda else 1

    def gpu_ms(self, call: Callable[[], object]) -> float:
        """Measure the GPU's time for one call, the host being ahead."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(7_000_000)  # type: ignore[no-untyped-call]  # some 4 ms
        start_event.record()
        call()
        end_event.record()
        torch.cuda.synchronize()
        return float(start_event.elapsed_time(end_event))

    def host_ms(self, prepare: Callable[[], object], call: Callable[[], object]) -> float:
        """Measure the host's time for one call, with nothing that waits for the GPU."""
        times = []
        for _ in range(9 if self.cuda else 1):
            prepare()
            if self.cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)

    def graph_ms(self, call: Callable[[], object]) -> float | None:
        """Measure one call under a CUDA graph; None where it cannot be captured."""
        if not self.cuda:
            return None
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return statistics.median(self.gpu_ms(graph.replay) for _ in range(7))


@dataclass
class Ceilings:
    """What the same card reached in the same run."""

    product_flops: float
    copy_bytes: float


def ceilings(timer: Timer, device: torch.device) -> Ceilings:
    """Measure a large bfloat16 product in FLOP/s and a large copy in bytes/s, read and written."""
    side, elements = (8192, 2**30) if timer.cuda else (64, 2**12)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.randn(elements, device=device).bfloat16()
    target = torch.empty_like(source)

    def median(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        return statistics.median(timer.gpu_ms(call) for _ in range(9)) / 1e3

    return Ceilings(
        2 * side**3 / median(lambda: left @ right),
        2 * source.nbytes / median(lambda: target.copy_(source)),
    )


class Deadline:
    """The run's budget."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether it is spent."""
        return time.monotonic() > self.end


def measure(
    shape: Shape,
    dtype: torch.dtype,
    memory_format: str,
    device: torch.device,
    wanted: Callable[[str], bool],
    timer: Timer,
    ceiling: Ceilings,
    deadline: Deadline,
) -> Iterator[Row]:
    """Time every wanted implementation at one shape, dtype and memory format, in both modes."""
    of_dtype = str(dtype).removeprefix("torch.")
    elements = torch.randn(shape, device=device).to(dtype, memory_format=FORMATS[memory_format])
    built = implementations(shape[1], rehearsal=not timer.cuda)
    for mode in MODES:
        workloads: dict[str, Workload] = {}
        rows = [Row(n, shape, of_dtype, memory_format, mode) for n in built if wanted(n)]
        for row in rows:
            name = row.implementation
            row.useful_flops = useful_flops(name, shape, mode)
            if deadline.passed:
                row.reason = "no time left"
                continue
            try:
                x = elements.clone()
                workload = Workload(built[name]().to(device, dtype), x, torch.randn_like(x))
                for _ in range(3 if timer.cuda else 1):
                    workload.prepare(mode)
                    workload.run(mode)
                workloads[name] = workload
                if timer.cuda:
                    row.peak_bytes = cuda_peak(workload, mode)
                prepare = functools.partial(workload.prepare, mode)
                run = functools.partial(workload.run, mode)
                row.host_ms = timer.host_ms(prepare, run)
                if name == OURS and mode == "inference":
                    row.graph_ms = timer.graph_ms(run)
                prepare()
            except Exception as error:
                row.reason = Failure.of(error).reason[:300]
        for _ in range(timer.rounds):
            for row in rows:
                if (found := workloads.get(row.implementation)) is None:
                    continue
                try:
                    found.prepare(mode)
                    row.milliseconds.append(timer.gpu_ms(functools.partial(found.run, mode)))
                except Exception as error:
                    row.reason = Failure.of(error).reason[:300]
        for row in rows:
            if row.milliseconds:
                row.milliseconds = [round(each, 5) for each in row.milliseconds]
                row.gpu_ms = statistics.median(row.milliseconds)
                per_second = 1e3 / row.gpu_ms
                row.share_of_product = row.useful_flops * per_second / ceiling.product_flops
                # x read and the result written; in training also both gradients.
                least = elements.nbytes * (2 if mode == "inference" else 5)
                row.share_of_copy = least * per_second / ceiling.copy_bytes
            yield row
        del workloads
        if timer.cuda:
            torch.cuda.empty_cache()


# What it must show, after the issue: on a Hopper card, in bfloat16, at 8x512x96x96.


@dataclass
class Target:
    """A figure that was asked for."""

    what: str
    against: str
    at_least: float
    aim: float
    reached: float | None
    less_is_better: bool = False

    @property
    def line(self) -> str:
        """In words."""
        reached = "no figure" if self.reached is None else f"{self.reached:.3g}"
        required = f"{'at most' if self.less_is_better else 'at least'} {self.at_least:g}"
        return f"{self.what}, against {self.against}: {required}, aim {self.aim:g}, {reached}"


def targets(rows: list[Row]) -> list[Target]:
    """Every target, the better of both memory formats on both sides."""

    def best(name: str, mode: Mode, what: str = "gpu_ms", shape: Shape = BASE) -> float | None:
        found = [
            getattr(row, what)
            for row in rows
            if row.implementation.startswith(name)
            and (row.shape, row.dtype, row.mode) == (shape, "bfloat16", mode)
            and (name != OFFICIAL or row.implementation == OFFICIAL)
        ]
        found = [each for each in found if each is not None]
        return min(found) if found else None

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    shares = [
        row.share_of_product
        for row in rows
        if (row.implementation, row.shape) == (OURS, BASE)
        and (row.mode, row.dtype) == ("inference", "bfloat16")
        and row.share_of_product is not None
    ]
    ours, odd = best(OURS, "inference"), best(OURS, "inference", shape=ODD)
    area = (ODD[2] * ODD[3]) / (BASE[2] * BASE[3])
    official, compiled = "the official block", "it under torch.compile"
    return [
        Target(
            "forward, speed", official, 4, 5, ratio(best(OFFICIAL, "inference"), ours)
        ),
        Target(
            "forward + backward, speed", official, 3, 4,
            ratio(best(OFFICIAL, "training"), best(OURS, "training")),
        ),
        Target(
            "forward + backward, speed", compiled, 1.5, 2,
            ratio(best(COMPILED, "training"), best(OURS, "training")),
        ),
        Target(
            "peak memory in training, its part in", official, 8, 10,
            ratio(best(OFFICIAL, "training", "peak_bytes"), best(OURS, "training", "peak_bytes")),
        ),
        Target(
            "forward, useful FLOP/s", "a large bfloat16 product", 0.4, 0.6,
            max(shares) if shares else None,
        ),
        Target(
            "forward, speed", "PyTorch's best fused kernel on turned slices", 1.1, 1.3,
            ratio(best("fully, sdpa", "inference"), ours),
        ),
        Target(
            "forward at 97×97, time per useful FLOP", "96×96", 1.25, 1.15,
            ratio(odd, ours * area if ours else None), less_is_better=True,
        ),
    ]  # fmt: skip


# Output.


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw the medians: one panel for each shape, dtype, memory format and mode that has any."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.gpu_ms]
    panels = list(dict.fromkeys((row.shape, row.dtype, row.memory_format) for row in timed))
    if not panels:
        return
    names = list(dict.fromkeys(row.implementation for row in rows))
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(11, 0.6 + 2.2 * len(panels)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 2, squeeze=False)
        for line, panel in zip(axes, panels, strict=True):
            for axis, mode in zip(line, MODES, strict=True):
                medians = {
                    row.implementation: row.gpu_ms
                    for row in timed
                    if (row.shape, row.dtype, row.memory_format, row.mode) == (*panel, mode)
                }
                values = [medians.get(name) or 0.0 for name in names]
                colours = ["#D55E00" if name == OURS else "#0072B2" for name in names]
                bars = axis.barh(names, values, color=colours)
                axis.bar_label(bars, [f" {value:.3g}" if value else " –" for value in values])
                axis.invert_yaxis()
                shape, dtype, memory_format = panel
                axis.set_title(f"{'x'.join(map(str, shape))}, {dtype}, {memory_format}, {mode}")
                axis.set_xlabel("ms on the GPU, median")
                axis.margins(x=0.15)
        figure.suptitle(title)
        figure.savefig(path, dpi=90)


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        return subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        ).stdout.split()[0]  # fmt: skip
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def as_text(report: dict[str, Any]) -> str:
    """JSON with a line for each check, row and target."""
    parts = []
    for name, value in report.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def show(console: Console, rows: list[Row]) -> None:
    """Print one table for each shape, dtype, memory format and mode."""
    for key in dict.fromkeys((r.shape, r.dtype, r.memory_format, r.mode) for r in rows):
        title = f"{'x'.join(map(str, key[0]))} {' '.join(key[1:])}"
        table = Table(title=title, title_justify="left")
        heads = (
            "implementation",
            "GPU ms",
            "spread",
            "ratio",
            "host",
            "graph",
            "MiB",
            "product",
        )
        for head in heads:
            table.add_column(head, justify="left" if head == "implementation" else "right")
        group = [r for r in rows if (r.shape, r.dtype, r.memory_format, r.mode) == key]
        base = next((row.gpu_ms for row in group if row.implementation == OFFICIAL), None)
        for row in group:
            if row.gpu_ms is None:
                table.add_row(row.implementation, "–")
                continue
            ordered = sorted(row.milliseconds)
            table.add_row(
                row.implementation,
                f"{row.gpu_ms:.4g}",
                f"{ordered[len(ordered) // 4]:.4g}–{ordered[len(ordered) * 3 // 4]:.4g}",
                f"{base / row.gpu_ms:.2f}" if base else "",
                f"{row.host_ms:.3g}" if row.host_ms is not None else "",
                f"{row.graph_ms:.4g}" if row.graph_ms is not None else "",
                f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes is not None else "",
                f"{row.share_of_product or 0:.1%}",
            )
        console.print(table)
        for row in group:
            if row.reason is not None:
                console.print(f"  {row.implementation}: {row.reason}", highlight=False)


def shape(text: str) -> Shape:
    """Read BxCxHxW."""
    sizes = tuple(int(each) for each in text.split("x"))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError
    return sizes


def main() -> int:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu.json, gpu.png")
    parser.add_argument("--rehearse", action="store_true", help="tiny maps, interpreted, no GPU")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds in all (150)")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="BxCxHxW")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument(
        "--implementations",
        nargs="+",
        help="those whose name begins so; all without this",
    )
    parser.add_argument("--checks-only", action="store_true", help="time nothing")
    args = parser.parse_args()
    console = Console(width=120)
    if not args.rehearse and not torch.cuda.is_available():
        print("there is no CUDA device here; --rehearse runs the script without one")
        return 2
    if (problem := triton.BACKEND.unavailable()) is not None:
        print(f"the Triton kernels cannot run here: {problem}")
        return 2
    device = torch.device("cpu" if args.rehearse else "cuda")
    args.output.mkdir(parents=True, exist_ok=True)
    import triton as of_triton

    deadline, timer = Deadline(args.budget), Timer(device)
    # Results are written after each group; a call that hangs is not waited for.
    faulthandler.dump_traceback_later(args.budget + 30, exit=True)
    # A kernel that gave way to PyTorch's operators is an error here.
    warnings.filterwarnings("error", message="fullattn's Triton kernels cannot run")
    about: dict[str, Any] = dataclasses.asdict(environment(device)) | {
        "triton": of_triton.__version__,
        "driver": driver(),
        "rehearsal": args.rehearse,
        "budget": args.budget,
        "shapes": args.shapes,
        "implementations": args.implementations,
        "unit": "FLOPs are 2 for a multiplication with an addition; recomputation is not counted",
    }
    console.print(about)
    path = args.output / "gpu.json"
    report: dict[str, Any] = {"about": about}

    def write() -> None:
        path.write_text(as_text(report))

    shapes = args.shapes or (TINY if args.rehearse else SHAPES)
    if not args.rehearse:
        for reason in compile_all(shapes, args.dtypes):
            console.print(f"does not compile: {reason}", highlight=False)
        console.print(f"compiled; {deadline.end - time.monotonic():.0f} s left")
    found = list(checks(device, rehearsal=args.rehearse))
    equal = check_bit_equal(device, rehearsal=args.rehearse)
    report["checks"] = [dataclasses.asdict(each) for each in found]
    report["checks_passed"] = equal and all(each.passed for each in found)
    write()
    for each in found:
        if not each.passed:
            console.print(f"WRONG {each.shape} {each.dtype} {each.layout}: {each.errors}")
    worst: dict[str, float] = {}
    for each in found:
        worst[each.dtype] = max(worst.get(each.dtype, 0.0), *each.errors.values())
    console.print(
        f"{len(found)} checks against float64, {sum(not each.passed for each in found)} wrong, "
        f"largest errors {worst}; two runs {'are' if equal else 'are NOT'} bit-equal; "
        f"{deadline.end - time.monotonic():.0f} s left"
    )
    if not report["checks_passed"]:
        console.print("a kernel is wrong: nothing is timed")
        return 1
    if args.checks_only:
        return 0

    ceiling = ceilings(timer, device)
    report["ceilings"] = dataclasses.asdict(ceiling)
    rows: list[Row] = []
    dtypes = ["float32"] if args.rehearse else args.dtypes
    for dtype in dtypes:
        for of_map in shapes:
            for memory_format in FORMATS:

                def wanted(name: str, of_map: Shape = of_map, last: str = memory_format) -> bool:
                    named = args.implementations
                    if named is not None and not any(name.startswith(each) for each in named):
                        return False
                    # Compiling takes longest.
                    return name != COMPILED or (of_map in shapes[:2] and last == "contiguous")

                rows += measure(
                    of_map,
                    DTYPES[dtype],
                    memory_format,
                    device,
                    wanted,
                    timer,
                    ceiling,
                    deadline,
                )
                report["rows"] = [dataclasses.asdict(row) for row in rows]
                report["targets"] = [dataclasses.asdict(each) for each in targets(rows)]
                write()
    show(console, rows)
    if not args.rehearse:
        for each in targets(rows):
            console.print(each.line, highlight=False)
        console.print(
            f"ceilings: {ceiling.product_flops / 1e12:.0f} TFLOP/s, "
            f"{ceiling.copy_bytes / 1e12:.2f} TB/s; {deadline.end - time.monotonic():.0f} s left"
        )
    title = f"{about['device_name']}, torch {about['torch']}, triton {about['triton']}"
    draw(
        rows,
        ("REHEARSAL, times mean nothing: " if args.rehearse else "") + title,
        args.output / "gpu.png",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
