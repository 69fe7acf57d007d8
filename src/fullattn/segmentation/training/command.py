"""`fullattn train`: its arguments, and errors as one sentence.

Everything that takes long to import is imported when the command runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fullattn._cli.arguments import Parser, count, seed
from fullattn._cli.errors import UsageError
from fullattn._cli.output import output_folder

if TYPE_CHECKING:
    from rich.console import Console

    from fullattn.segmentation.training.config import Config
    from fullattn.segmentation.training.run import Result

__all__ = ["configure"]

_NEEDED = {
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "yaml": "pyyaml",
    "tensorboard": "tensorboard",
    "torchvision": "torchvision",
    "timm": "timm",
    "PIL": "pillow",
    "rich": "rich",
}

_EXAMPLES = """\
examples:
  fullattn train camvid_small --data data/camvid --output out/camvid
  fullattn train camvid_small --data data/camvid --output out/camvid --resume
  fullattn train camvid_small --data data/camvid --attention channel --seed 1 \\
      --set training.steps=1000 data.train=train+val data.val=null
  torchrun --nproc-per-node 8 -m fullattn train cityscapes --data data/cityscapes --output out/city

A configuration is one of those that come with fullattn (ade20k, camvid, camvid_small, cityscapes,
voc) or a YAML file of the same form. The output folder gets last.ckpt, best.ckpt, config.yaml, and
logs/ for TensorBoard. A run that was killed at any moment goes on with --resume.
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn train`."""
    parser.description = "Train FLANet, or the same network with another attention, on a data set."
    parser.epilog = _EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="name of a configuration, or a YAML file")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="ROOT", help="folder of the data set"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/train"),
        metavar="DIR",
        help="folder of checkpoints and logs (out/train)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from last.ckpt in the output folder"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out files that cannot be read, and list them in skipped.txt",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not read every file before the first step"
    )
    what = parser.add_argument_group("instead of what the configuration says")
    what.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any key of it, the value in YAML: training.steps=100 data.val=null",
    )
    what.add_argument("--attention", metavar="NAME", help="model.attention")
    what.add_argument("--seed", type=seed, help="training.seed")
    what.add_argument(
        "--accumulate",
        type=count,
        metavar="PARTS",
        help="training.accumulate: take a step's images in so many parts, for less memory",
    )
    what.add_argument("--precision", metavar="NAME", help="training.precision")
    what.add_argument("--strategy", metavar="NAME", help="training.strategy: auto, ddp or fsdp")
    where = parser.add_argument_group("on which machines")
    where.add_argument(
        "--devices",
        type=count,
        help="GPUs or CPU processes of each machine (all GPUs, or one CPU process)",
    )
    where.add_argument("--nodes", type=count, help="machines (1)")
    parser.set_defaults(run=_train)


@contextmanager
def _sentences() -> Iterator[None]:
    """What the library finds wrong with what the user gave it, as the user's one sentence."""
    from fullattn.checkpoints import CheckpointError
    from fullattn.segmentation.data import DataError
    from fullattn.segmentation.training.config import ConfigError
    from fullattn.segmentation.training.module import NonFiniteError

    try:
        yield
    except (CheckpointError, ConfigError, DataError, NonFiniteError) as error:
        raise UsageError(str(error)) from error


def _train(args: argparse.Namespace) -> None:
    missing = [name for module, name in _NEEDED.items() if not importlib.util.find_spec(module)]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}: pip install 'fullattn[train]'")
    config = _config(args)
    with _sentences():
        from lightning.pytorch.utilities import rank_zero_only
        from rich.console import Console

        from fullattn.segmentation.training.train import train

    # One process of several checks the files, writes and speaks.
    first = getattr(rank_zero_only, "rank", 0) == 0
    console = Console(soft_wrap=True) if first else None
    if first and not args.resume and args.output.is_dir() and any(args.output.iterdir()):
        raise UsageError(
            f"expected an empty or new output folder, and {str(args.output)!r} holds files: "
            "continue its run with --resume, or name another with --output"
        )
    with output_folder(args.output), _sentences():
        try:
            result = train(
                config,
                args.data,
                args.output,
                resume=args.resume,
                skip_bad=args.skip_bad,
                check=not args.no_check,
                devices=args.devices,
                nodes=args.nodes,
                console=console,
            )
        except KeyboardInterrupt:
            where = f"{args.output / 'last.ckpt'} can be continued with --resume"
            print(f"fullattn: interrupted; {where}", file=sys.stderr)  # noqa: T201
            raise SystemExit(130) from None
    if console is not None:
        _report(result, args.output, console)


def _config(args: argparse.Namespace) -> Config:
    from fullattn.segmentation.training.config import ConfigError, read

    own = {
        "model.attention": args.attention,
        "training.seed": args.seed,
        "training.accumulate": args.accumulate,
        "training.precision": args.precision,
        "training.strategy": args.strategy,
    }
    overrides = [f"{key}={value}" for key, value in own.items() if value is not None]
    try:
        return read(args.config, [*args.set, *overrides])
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _report(result: Result, output: Path, console: Console) -> None:
    scores = "" if result.scores is None else f", val mIoU {result.scores.mean_iou:.4f}"
    console.print(f"step {result.step}: {result.checkpoint}{scores}", highlight=False)
    if result.best is not None:
        path, mean = result.best
        console.print(f"best: {path}, val mIoU {mean:.4f}", highlight=False)
    if result.skipped:
        console.print(
            f"{len(result.skipped)} files were left out; they are listed in "
            f"{output / 'skipped.txt'}:",
            highlight=False,
        )
        for file in result.skipped[:10]:
            console.print(f"  {file}", markup=False, highlight=False)
