"""The Triton kernels on a GPU: checked against float64, then timed against what else there is.

    PYTHONPATH=src python benchmarks/gpu.py --output benchmarks/results/gpu      # on the GPU
    python benchmarks/gpu.py --rehearse --output out/rehearsal    # anywhere, for no figures

Every kernel is checked first; nothing is timed if one is wrong. Then for each shape and dtype all
contenders take turns, forward and forward + backward: the official implementation, the same under
`torch.compile`, our layer on each of PyTorch's fused kernels, our layer on the Triton kernels, and
the two compression layers built and fused. Two ceilings are measured in the same run: a large
bfloat16 matrix product and a large copy. What does not fit into the budget is marked so.

A rehearsal runs the same on the CPU, with tiny maps and the kernels interpreted: it proves the
script, and its times say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal, costs
from fullattn.attention import triton
from fullattn.bench.conditions import environment
from fullattn.bench.failures import Failure
from fullattn.bench.measure import Clock, clock_for, take_turns
from fullattn.bench.memory import cuda_peak
from fullattn.bench.official import OfficialFLANetBlock
from fullattn.bench.workload import MODES, Mode, Workload
from fullattn.functional import columns_and_rows

Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [
    (8, 512, 96, 96),
    (8, 512, 97, 97),
    (1, 512, 128, 256),
    (2, 2048, 64, 64),
    (16, 128, 64, 64),
]
TINY: list[Shape] = [(2, 16, 4, 5)]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHECKED: list[Shape] = [
    (1, 1, 1, 1),
    (3, 40, 7, 18),
    (2, 64, 96, 96),
    (1, 300, 65, 130),
    (1, 33, 256, 5),
    (1, 48, 1, 512),
    (2, 512, 97, 97),
    (70_000, 3, 1, 2),
]
# By how much a result may differ from float64's, relative to its largest number.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
OFFICIAL, COMPILED, TRITON = (
    "official implementation",
    "official implementation, torch.compile",
    "fully, triton",
)
CHANNELS_LAST = "fully, triton, channels_last"
IN_PLACE = "fully, triton, without windows"
BASE = SHAPES[0]


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


class InPlace(Workload):
    """Runs the kernels on slices where they lie, without windows."""

    def run(self, mode: Mode) -> None:
        """Call the module once."""
        from fullattn.attention.triton import launch

        launch.IN_PLACE = True
        try:
            super().run(mode)
        finally:
            launch.IN_PLACE = False


def contenders(channels: int, *, rehearsal: bool) -> dict[str, Callable[[], nn.Module]]:
    """Every module to be timed, by name."""

    def fully(backend: str) -> nn.Module:
        return FullyAttentional(channels, project=False, gamma_init=0.5, backend=backend)

    def public() -> nn.Module:
        module = OfficialFLANetBlock(channels)
        nn.init.constant_(module.gamma, 0.5)
        return module

    compiler = "aot_eager" if rehearsal else "inductor"
    return {
        OFFICIAL: public,
        COMPILED: lambda: torch.compile(public(), backend=compiler),
        "fully, sdpa cuDNN": lambda: OnKernel(fully("sdpa"), SDPBackend.CUDNN_ATTENTION),
        "fully, sdpa flash": lambda: OnKernel(fully("sdpa"), SDPBackend.FLASH_ATTENTION),
        "fully, sdpa efficient": lambda: OnKernel(fully("sdpa"), SDPBackend.EFFICIENT_ATTENTION),
        TRITON: lambda: fully("triton"),
        CHANNELS_LAST: lambda: fully("triton"),
        IN_PLACE: lambda: fully("triton"),
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


# Correctness.


@dataclass
class Check:
    """The largest relative error of a kernel's results at one shape."""

    shape: Shape
    dtype: str
    layout: str
    errors: dict[str, float]
    passed: bool


def check(shape: Shape, dtype: torch.dtype, layout: str, device: torch.device) -> Check:
    """Compare the operator, forward and every gradient, with float64 on the same device."""
    batch, channels, height, width = shape
    # Fresh numbers for every check: no seed.
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
    if layout == "sliced":
        x = torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    column_key = torch.randn(batch, height, channels, device=device).to(dtype).mT
    row_key = torch.randn(batch, width, channels, device=device).to(dtype).mT
    gamma, grad = torch.full((1,), 0.7).to(x), torch.randn(shape, device=device).to(dtype)

    inputs = [each.detach().requires_grad_() for each in (x, column_key, row_key, gamma)]
    y = triton.axial_channel_attention(*inputs[:3], 0.5, inputs[3])
    actual = [y, *torch.autograd.grad(y, inputs, grad)]

    exact = [torch.zeros_like(each, dtype=torch.float64) for each in actual]
    # A few images at a time: float64's maps are large.
    step = max(1, 2**28 // (channels * channels * (height + width)))
    for first in range(0, batch, step):
        part = slice(first, first + step)
        given = [each[part].detach().double().requires_grad_() for each in inputs[:3]]
        given.append(gamma.double().requires_grad_())
        result = given[3] * columns_and_rows(*given[:3], scale=0.5) + given[0]
        *found, to_gamma = torch.autograd.grad(result, given, grad[part].double())
        for into, each in zip(exact, [result.detach(), *found], strict=False):
            into[part] = each
        exact[4] += to_gamma
    size = 0.01 * max(each.abs().max().item() for each in exact)
    errors = {}
    for name, one, other in zip(
        ("result", "x", "column_key", "row_key", "gamma"), actual, exact, strict=True
    ):
        largest = max(other.abs().max().item(), size, 1e-30)
        errors[name] = ((one.double() - other).abs().max() / largest).item()
    # Not "<=" of the largest: NaN must not pass.
    passed = all(error <= TOLERANCE[dtype] for error in errors.values())
    return Check(shape, str(dtype).removeprefix("torch."), layout, errors, passed)


def check_bit_equal(device: torch.device) -> bool:
    """Whether two runs agree to the last bit under PyTorch's deterministic switch."""
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        x = torch.randn(2, 40, 7, 18, device=device)
        keys = torch.randn(2, 40, 7, device=device), torch.randn(2, 40, 18, device=device)
        for _ in range(2):
            inputs = [each.detach().requires_grad_() for each in (x, *keys)]
            y = triton.axial_channel_attention(*inputs)
            found.append([y, *torch.autograd.grad(y, inputs, x)])
        return all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# Speed.


@dataclass
class Row:
    """One contender at one shape, dtype and mode; None where it has no figure."""

    contender: str
    shape: Shape
    dtype: str
    mode: Mode
    milliseconds: list[float] = field(default_factory=list)
    median: float | None = None
    peak_bytes: int | None = None
    useful_flops: int = 0
    share_of_product: float | None = None
    share_of_copy: float | None = None
    reason: str | None = None


@dataclass
class Ceilings:
    """What the same card reached in the same run."""

    product_flops: float
    copy_bytes: float


def ceilings(clock: Clock, device: torch.device, *, rehearsal: bool) -> Ceilings:
    """A large bfloat16 matrix product in FLOP/s, and a large copy in bytes/s, read and written."""
    side, numbers = (64, 2**12) if rehearsal else (8192, 2**30)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source = torch.randn(numbers, device=device).bfloat16()
    target = torch.empty_like(source)

    def median(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        return statistics.median(clock.milliseconds(call) for _ in range(15)) / 1e3

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
    device: torch.device,
    clock: Clock,
    ceiling: Ceilings,
    deadline: Deadline,
    *,
    rehearsal: bool,
    compiled: bool,
) -> Iterator[Row]:
    """Time every contender at one shape and dtype."""
    name_of_dtype = str(dtype).removeprefix("torch.")
    numbers = torch.randn(shape, device=device).to(dtype)
    for mode in MODES:
        workloads: dict[str, Workload] = {}
        rows: dict[str, Row] = {}
        for name, build in contenders(shape[1], rehearsal=rehearsal).items():
            row = rows[name] = Row(name, shape, name_of_dtype, mode)
            row.useful_flops = useful_flops(name, shape, mode)
            if deadline.passed or (name == COMPILED and not compiled):
                row.reason = "no time left"
                continue
            x = numbers.clone()
            if name == CHANNELS_LAST:
                x = x.contiguous(memory_format=torch.channels_last)
            kind = InPlace if name == IN_PLACE else Workload
            workload = kind(build().to(device, dtype), x, torch.randn_like(x))
            try:
                for _ in range(1 if rehearsal else 3):
                    workload.prepare(mode)
                    workload.run(mode)
                if device.type == "cuda":
                    row.peak_bytes = cuda_peak(workload, mode)
                workload.prepare(mode)
                workloads[name] = workload
            except Exception as error:
                row.reason = Failure.of(error).reason[:300]
        calls = dict.fromkeys(workloads, 2 if rehearsal else 20)
        times, failures = take_turns(workloads, calls, mode, clock)
        for name, row in rows.items():
            if name in failures:
                row.reason = failures[name].reason[:300]
            elif name in times:
                row.milliseconds = [round(each, 5) for each in times[name]]
                row.median = statistics.median(times[name])
                per_second = 1e3 / row.median
                row.share_of_product = row.useful_flops * per_second / ceiling.product_flops
                # x read and the result written; in training also both gradients.
                least = numbers.nbytes * (2 if mode == "inference" else 5)
                row.share_of_copy = least * per_second / ceiling.copy_bytes
            yield row
        del workloads
        if device.type == "cuda":
            torch.cuda.empty_cache()


# What it must show, after the issue: on a Hopper card, in bfloat16, at 8x512x96x96.


def targets(rows: list[Row]) -> list[tuple[str, float, float | None]]:
    """(what, at least, reached) for every target."""
    found = {
        (row.contender, row.mode): row
        for row in rows
        if row.shape == BASE and row.dtype == "bfloat16"
    }

    def ratio(one: tuple[str, Mode], other: tuple[str, Mode], what: str) -> float | None:
        values = [getattr(found.get(key), what, None) for key in (one, other)]
        return values[0] / values[1] if all(values) else None

    fused = [
        row.median
        for (name, mode), row in found.items()
        if name.startswith("fully, sdpa") and mode == "inference" and row.median
    ]
    ours = found.get((TRITON, "inference"))
    own = ours.median if ours else None
    return [
        (
            "forward, against the official implementation",
            5.0,
            ratio((OFFICIAL, "inference"), (TRITON, "inference"), "median"),
        ),
        (
            "forward + backward, against the official implementation",
            4.0,
            ratio((OFFICIAL, "training"), (TRITON, "training"), "median"),
        ),
        (
            "forward + backward, against it under torch.compile",
            2.0,
            ratio((COMPILED, "training"), (TRITON, "training"), "median"),
        ),
        (
            "peak memory in training, the official implementation's over ours",
            10.0,
            ratio((OFFICIAL, "training"), (TRITON, "training"), "peak_bytes"),
        ),
        (
            "forward, share of the bfloat16 product",
            0.45,
            ours.share_of_product if ours else None,
        ),
        (
            "forward, against the best fused kernel on copied slices",
            1.2,
            min(fused) / own if fused and own else None,
        ),
    ]


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw the medians: one panel for each shape and dtype that has any."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row.shape, row.dtype) for row in rows if row.median))
    names = list(dict.fromkeys(row.contender for row in rows))
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(11, 0.6 + 2.4 * len(panels)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 2, squeeze=False)
        for line, (shape, dtype) in zip(axes, panels, strict=True):
            for axis, mode in zip(line, MODES, strict=True):
                medians = {
                    row.contender: row.median
                    for row in rows
                    if (row.shape, row.dtype, row.mode) == (shape, dtype, mode)
                }
                values = [medians.get(name) or 0.0 for name in names]
                colours = ["#D55E00" if "triton" in name else "#0072B2" for name in names]
                bars = axis.barh(names, values, color=colours)
                labels = [f" {value:.3g}" if value else " –" for value in values]
                axis.bar_label(bars, labels)
                axis.invert_yaxis()
                axis.set_title(f"{'x'.join(map(str, shape))}, {dtype}, {mode}")
                axis.set_xlabel("ms, median")
                axis.margins(x=0.15)
        figure.suptitle(title)
        figure.savefig(path, dpi=110)


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        return subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def show(console: Console, rows: list[Row]) -> None:
    """Print one table for each shape, dtype and mode."""
    groups = dict.fromkeys((row.shape, row.dtype, row.mode) for row in rows)
    for shape, dtype, mode in groups:
        table = Table(title=f"{'x'.join(map(str, shape))} {dtype} {mode}", title_justify="left")
        for head in ("contender", "median ms", "spread", "ratio", "peak MiB", "product", "copy"):
            table.add_column(head, justify="left" if head == "contender" else "right")
        group = [row for row in rows if (row.shape, row.dtype, row.mode) == (shape, dtype, mode)]
        base = next((row.median for row in group if row.contender == OFFICIAL), None)
        for row in group:
            if row.median is None:
                table.add_row(row.contender, "–")
                continue
            ordered = sorted(row.milliseconds)
            table.add_row(
                row.contender,
                f"{row.median:.4g}",
                f"{ordered[len(ordered) // 4]:.4g}–{ordered[len(ordered) * 3 // 4]:.4g}",
                f"{base / row.median:.2f}" if base else "",
                f"{row.peak_bytes / 2**20:.1f}" if row.peak_bytes is not None else "",
                f"{row.share_of_product or 0:.1%}",
                f"{row.share_of_copy or 0:.1%}",
            )
        console.print(table)
        for row in group:
            if row.reason is not None:
                console.print(f"  {row.contender}: {row.reason}", highlight=False)


def main() -> int:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu.json, gpu.png")
    parser.add_argument("--rehearse", action="store_true", help="tiny maps, interpreted, no GPU")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds in all (420)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    console = Console(width=110)
    if not args.rehearse and not torch.cuda.is_available():
        print("there is no CUDA device here; --rehearse runs the script without one")
        return 2
    device = torch.device("cpu" if args.rehearse else "cuda")
    args.output.mkdir(parents=True, exist_ok=True)
    problem = triton.BACKEND.unavailable()
    if problem is not None:
        print(f"the Triton kernels cannot run here: {problem}")
        return 2
    from fullattn.attention.triton import tuning

    deadline, clock = Deadline(args.budget), clock_for(device)
    about: dict[str, Any] = dataclasses.asdict(environment(device)) | {
        "triton": tuning.triton.__version__,
        "driver": driver(),
        "rehearsal": args.rehearse,
        "unit": "FLOPs are 2 for a multiplication with an addition; recomputation is not counted",
    }
    console.print(about)

    dtypes = [DTYPES[name] for name in args.dtypes]
    if args.rehearse:
        dtypes = [dtype for dtype in dtypes if dtype != torch.bfloat16]  # wrong when interpreted
    checked = [(2, 5, 3, 4)] if args.rehearse else CHECKED
    layouts = ("contiguous", "channels_last", "sliced")
    checks = [check(s, d, layout, device) for s in checked for d in dtypes for layout in layouts]
    checks_passed = all(each.passed for each in checks) and check_bit_equal(device)
    for each in checks:
        worst = max(each.errors, key=lambda name: each.errors[name])
        if not each.passed or each is checks[-1]:
            console.print(
                f"{'ok' if each.passed else 'WRONG'} {each.shape} {each.dtype} "
                f"{each.layout}: {worst} off by {each.errors[worst]:.2g}"
            )
    report: dict[str, Any] = {"about": about, "checks_passed": checks_passed}
    report["checks"] = [dataclasses.asdict(each) for each in checks]
    path = args.output / "gpu.json"
    path.write_text(json.dumps(report, indent=1))
    if not checks_passed:
        console.print("a kernel is wrong: nothing is timed")
        return 1
    console.print(f"{len(checks)} checks against float64 passed, two runs are bit-equal")

    ceiling = ceilings(clock, device, rehearsal=args.rehearse)
    report["ceilings"] = dataclasses.asdict(ceiling)
    rows: list[Row] = []
    for dtype in dtypes:
        for shape in TINY if args.rehearse else SHAPES:
            # Compiling takes longest; bfloat16, which people train in, has it at every shape.
            rows += measure(
                shape, dtype, device, clock, ceiling, deadline,
                rehearsal=args.rehearse, compiled=args.rehearse or dtype == torch.bfloat16,
            )  # fmt: skip
            report["rows"] = [dataclasses.asdict(row) for row in rows]
            report["tuned"] = tuning.choices()
            path.write_text(json.dumps(report, indent=1))
    show(console, rows)
    if not args.rehearse:
        for what, least, reached in targets(rows):
            console.print(f"{what}: at least {least:g}, reached {reached and round(reached, 3)}")
        console.print(
            f"ceilings: {ceiling.product_flops / 1e12:.0f} TFLOP/s, "
            f"{ceiling.copy_bytes / 1e12:.2f} TB/s; tuned: {tuning.choices()}"
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
