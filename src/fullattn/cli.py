"""The command line: what layers cost, and networks with them trained, evaluated and used.

Whatever the user asks for that cannot be done ends with one sentence on standard error and exit
status 2; Ctrl-C ends with 130. In neither case is anything written.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import einops
import torch

import fullattn
from fullattn.arguments import Adds, Parser, count, seconds, seed, setting, words
from fullattn.attention import dispatch
from fullattn.bench.conditions import (
    DTYPES,
    MEMORY_FORMATS,
    Conditions,
    device_name,
    parse_device,
    parse_dtype,
)
from fullattn.bench.contenders import OFFICIAL, inputs_of, layer_named
from fullattn.bench.errors import UsageError
from fullattn.bench.shapes import (
    DEFAULT_BUDGET,
    DEFAULT_SHAPES,
    NAMED,
    Shape,
    parse_shape,
    sweep_shapes,
)
from fullattn.bench.workload import MODES, Mode
from fullattn.evaluation.command import add_evaluate, add_predict
from fullattn.evaluation.maps_command import add_maps
from fullattn.layers import LAYERS
from fullattn.training.command import add_train

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["main"]

_LAYER_HELP = f"{', '.join(LAYERS)}, or FILE.py:CLASS of a layer that is registered there"
_EXTRA = ("rich", "matplotlib", "pillow")

_BENCH_EXAMPLES = f"""\
examples:
  fullattn bench
  fullattn bench --shapes 512x97x97 8x512x96x96 cityscapes --mode inference
  fullattn bench --layers fully --backends all --dtype bfloat16
  fullattn bench --layers fully --sweep resolution --shapes 512x128x128
  fullattn bench --shapes 97 --contender my_block.py:MyBlock --baseline my_block:MyBlock
  fullattn bench --image street.jpg
  fullattn bench --output out/now --compare out/before/bench.json

shapes by name:
{chr(10).join(f"  {name:<15} {shape!s:<14} {what}" for name, (shape, what) in NAMED.items())}
"""

_SWAP_EXAMPLES = """\
examples:
  fullattn swap torchvision.models.segmentation:deeplabv3_resnet50 --target classifier.0 \\
      --model-options weights=None weights_backbone=None --shape 2x3x512x512
  fullattn swap my_net.py:Net --insert --target backbone.layer4 --layer-options project=False
  fullattn swap segmentation_models_pytorch:Unet --model-options encoder_weights=None \\
      --insert --target encoder.layer4 --shape 2x3x256x256 --image street.jpg
"""

_INFO_EXAMPLES = """\
examples:
  fullattn info
  fullattn info --shape 4x128x64x64 --dtype bfloat16 --layer fully
  FULLATTN_BACKEND=sdpa fullattn info
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fullattn",
        description="Attention layers for 2-D feature maps: what they cost, and what runs them.",
    )
    parser.add_argument("--version", action="version", version=f"fullattn {fullattn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_bench(commands)
    _add_swap(commands)
    add_train(commands)
    add_evaluate(commands)
    add_predict(commands)
    add_maps(commands)
    _add_info(commands)
    return parser


def _add_conditions(parser: Adds) -> None:
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPE", help=f"{', '.join(DTYPES)} (float32)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (cpu)")


def _add_inputs(parser: Adds) -> None:
    parser.add_argument(
        "--memory-format",
        default="contiguous",
        metavar="FORMAT",
        help=f"{' or '.join(MEMORY_FORMATS)} (contiguous)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of parameters and inputs (0)")
    parser.add_argument("--threads", type=count, help="PyTorch's threads (PyTorch's own choice)")


def _add_repetition(parser: Adds) -> None:
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=2.0,
        help="to spend on timing one contender at one shape in one mode; 3 to 20 calls (2)",
    )
    parser.add_argument("--repeats", type=count, help="time exactly so many calls of each instead")
    parser.add_argument(
        "--no-memory",
        action="store_true",
        help="do not measure peak memory; saves one process and one call for every figure, and the "
        "check that a row fits into memory before it is timed",
    )


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="compare what layers and backends cost",
        description="Compare the layers, their backends, the official implementation and your "
        "own modules: parameters, FLOPs, time, peak memory. Prints tables, writes JSON and a "
        "picture.",
        epilog=_BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = bench.add_argument_group("what is compared")
    what.add_argument(
        "--layers", nargs="+", default=list(LAYERS), metavar="LAYER", help=_LAYER_HELP
    )
    what.add_argument(
        "--backends",
        nargs="+",
        default=["default"],
        metavar="BACKEND",
        help="names of backends; auto: the one that runs when none is asked for; all: every one "
        "that can run; default: the automatic one, and the map built and fused. With auto, channel "
        "and spatial are still run both built and fused",
    )
    what.add_argument(
        "--contender",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help="your own module, or package.module:CLASS; the class is called with the number of "
        "channels, the module with a (B, C, H, W) tensor. May be given several times",
    )
    what.add_argument(
        "--baseline",
        default=OFFICIAL,
        metavar="NAME",
        help="the contender that ratios refer to: official (the official implementation), fully, "
        "channel:reference, my_block:MyBlock, ... (public)",
    )
    what.add_argument(
        "--project",
        action="store_true",
        help="with the 3x3 projection of FullyAttentional and of the official code, which is left "
        "out so that attention is compared with attention",
    )
    at = bench.add_argument_group("at which shapes and conditions")
    at.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help="CxHxW, BxCxHxW or names, listed below"
    )
    at.add_argument(
        "--sweep",
        choices=("resolution", "channels"),
        help="five sizes up to the shape given, with a picture of how cost grows",
    )
    at.add_argument(
        "--mode",
        choices=("inference", "training", "both"),
        help="forward, forward and backward, or both (both; without --shapes, two of the four "
        "shapes are run forward only)",
    )
    _add_conditions(at)
    at.add_argument(
        "--image",
        metavar="PHOTO",
        help="make the inputs from a photograph, through a small random convolutional stem",
    )
    _add_inputs(at)
    how = bench.add_argument_group("how it is measured")
    _add_repetition(how)
    how.add_argument(
        "--limit",
        type=seconds,
        default=10.0,
        help="leave a row out where one call takes more seconds than this (10)",
    )
    how.add_argument(
        "--budget",
        type=seconds,
        help="seconds for the whole run, which all shapes and modes share; what does not fit is "
        f"timed less often or left out ({DEFAULT_BUDGET:g} without --shapes and --sweep, "
        "otherwise none)",
    )
    out = bench.add_argument_group("what comes out")
    out.add_argument(
        "--output",
        type=Path,
        default=Path("out/bench"),
        metavar="DIR",
        help="folder of bench.json and bench.png, or sweep.json and sweep.png (out/bench)",
    )
    out.add_argument(
        "--compare",
        metavar="OLD.json",
        help="show what became slower than in an earlier run, beyond the noise",
    )
    bench.set_defaults(run=_bench)


def _add_swap(commands: argparse._SubParsersAction[Parser]) -> None:
    swap = commands.add_parser(
        "swap",
        help="put a layer into a network and see what that costs",
        description="Put one of the layers into a network that can be imported, in place of a "
        "module or behind it, and print parameters, FLOPs, time and memory before and after.",
        epilog=_SWAP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    swap.add_argument(
        "model",
        metavar="MODEL",
        help="package.module:FACTORY or FILE.py:FACTORY; the factory builds the network",
    )
    swap.add_argument(
        "--target",
        required=True,
        metavar="NAME",
        help="dotted name of the module, or a glob over dotted names",
    )
    swap.add_argument("--layer", default="fully", metavar="LAYER", help=f"{_LAYER_HELP} (fully)")
    swap.add_argument("--insert", action="store_true", help="behind the target, not in its place")
    for name, what in (("--model-options", "the factory"), ("--layer-options", "the layer")):
        swap.add_argument(
            name,
            nargs="+",
            type=setting,
            default=[],
            metavar="NAME=VALUE",
            help=f"what {what} is called with, beside its defaults",
        )
    swap.add_argument(
        "--shape",
        default="1x3x512x512",
        metavar="SHAPE",
        help="of the images, CxHxW or BxCxHxW (1x3x512x512)",
    )
    swap.add_argument("--image", metavar="PHOTO", help="a photograph as input, in place of noise")
    swap.add_argument(
        "--mode", choices=("inference", "training", "both"), default="both", help="(both)"
    )
    _add_conditions(swap)
    _add_inputs(swap)
    _add_repetition(swap)
    swap.set_defaults(run=_swap, project=False)


def _add_info(commands: argparse._SubParsersAction[Parser]) -> None:
    info = commands.add_parser(
        "info",
        help="say which backend runs, and why the others do not",
        description="Versions, the device, and for a shape, dtype and device which backend runs "
        "and why each other one does not.",
        epilog=_INFO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    info.add_argument(
        "--shape", default="512x97x97", metavar="SHAPE", help="CxHxW or BxCxHxW (512x97x97)"
    )
    info.add_argument("--layer", nargs="+", default=list(LAYERS), metavar="LAYER", help=_LAYER_HELP)
    _add_conditions(info)
    info.set_defaults(run=_info)


def _conditions(args: argparse.Namespace) -> Conditions:
    parse_dtype(args.dtype)
    parse_device(args.device)
    if args.memory_format not in MEMORY_FORMATS:
        allowed = " or ".join(MEMORY_FORMATS)
        raise UsageError(f"expected a memory format of {allowed}, got {args.memory_format!r}")
    return Conditions(
        device=args.device,
        dtype=args.dtype,
        memory_format=args.memory_format,
        project=args.project,
        threads=args.threads or torch.get_num_threads(),
        seed=args.seed,
        image=args.image,
    )


def _bench(args: argparse.Namespace) -> None:
    _need_extra("the benchmark")
    from fullattn.bench.measure import Plan
    from fullattn.bench.report import read_report
    from fullattn.bench.run import Options, bench

    modes = _modes(args.mode)
    budget = args.budget
    given = [parse_shape(text) for text in words(args.shapes or [])]
    shapes: list[tuple[Shape, tuple[Mode, ...]]]
    if args.sweep:
        if len(given) > 1:
            raise UsageError(f"expected one shape for --sweep to end at, got {len(given)}")
        largest = given[0] if given else Shape(1, 128, 96, 96)
        shapes = [(shape, modes) for shape in sweep_shapes(largest, args.sweep)]
    elif given:
        shapes = [(shape, modes) for shape in dict.fromkeys(given)]
    else:
        budget = args.budget or DEFAULT_BUDGET
        shapes = [
            (parse_shape(text), modes if args.mode else by_default)
            for text, by_default in DEFAULT_SHAPES
        ]
    options = Options(
        shapes=shapes,
        conditions=_conditions(args),
        layers=[layer_named(layer) for layer in words(args.layers)],
        backends=words(args.backends),
        users=args.contender,
        baseline=args.baseline,
        sweep=args.sweep,
        plan=Plan(args.seconds, args.repeats, args.limit, budget),
        memory=not args.no_memory,
    )
    old = None if args.compare is None else read_report(args.compare)
    bench(options, args.output, old, _console())


def _need_extra(what: str) -> None:
    missing = [name for name in ("rich", "matplotlib", "PIL") if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}: pip install 'fullattn[bench]'")


def _modes(chosen: str | None) -> tuple[Mode, ...]:
    """The mode of that name, or for any other name both."""
    return tuple(mode for mode in MODES if mode == chosen) or MODES


def _console() -> Console:
    from rich.console import Console

    from fullattn.bench.table import WIDTH

    console = Console()
    if not console.is_terminal or console.width < WIDTH:
        console = Console(width=WIDTH)
    return console


def _swap(args: argparse.Namespace) -> None:
    _need_extra("the comparison")
    from fullattn.bench.before_after import compare
    from fullattn.bench.measure import Plan
    from fullattn.bench.network import Network

    shape = parse_shape(args.shape)
    if args.image is not None and shape.channels != 3:
        raise UsageError(f"expected a shape of 3 channels for --image, got {shape}")
    network = Network(
        factory=args.model,
        options=dict(args.model_options),
        shape=shape,
        conditions=_conditions(args),
        target=args.target,
        layer=layer_named(args.layer),
        layer_options=dict(args.layer_options),
        behind=args.insert,
    )
    plan = Plan(args.seconds, args.repeats)
    compare(network, _modes(args.mode), plan, _console(), memory=not args.no_memory)


def _info(args: argparse.Namespace) -> None:
    shape = parse_shape(args.shape)
    dtype = parse_dtype(args.dtype)
    device = parse_device(args.device)
    layers = [layer_named(layer) for layer in words(args.layer)]
    lines = [
        f"fullattn {fullattn.__version__}, torch {torch.__version__}, "
        f"einops {einops.__version__}, Python {platform.python_version()}",
        f"device: {device}, {device_name(device)}"
        + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""),
        f"benchmark: {_versions('bench', *_EXTRA)}",
        f"training: {_versions('train', 'timm', 'torchvision', 'lightning', 'torchmetrics')}",
        f"GPU kernels: {_versions('triton', 'triton')}",
        "backends:",
        *(f"  {entry.name:<13} {entry.summary}" for entry in dispatch.BACKENDS),
        "layers:",
        *(f"  {name:<13} {layer.__name__}, {layer.paper}" for name, layer in LAYERS.items()),
    ]
    for layer in layers:
        lines += ["", f"{LAYERS[layer].__name__} at {shape}, {args.dtype}, {device}:"]
        try:
            explained = dispatch.explain(inputs_of(layer, shape, dtype, device.type))
        except ValueError as error:  # FULLATTN_BACKEND does not name a backend
            raise UsageError(str(error)) from error
        lines += [f"  {entry.name:<13} {sentence}" for entry, sentence in explained]
    print("\n".join(lines))  # noqa: T201


def _versions(extra: str, *names: str) -> str:
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            return f"{name} is missing: pip install 'fullattn[{extra}]'"
    return ", ".join(versions)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for the process's own.

    Returns:
        Exit status: 0; 2 for bad input; 130 for an interruption.
    """
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except SystemExit as end:  # argparse has printed its help or its sentence
        return end.code if isinstance(end.code, int) else 2
    except UsageError as error:
        print(f"fullattn: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("fullattn: interrupted, nothing was written", file=sys.stderr)  # noqa: T201
        return 130
    return 0
