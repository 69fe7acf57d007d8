"""The command `fullattn train`. Slow imports wait until it runs."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fullattn._cli.arguments import Parser, count, need_packages
from fullattn._cli.errors import UsageError, sentences
from fullattn._cli.output import output_folder

if TYPE_CHECKING:
    from rich.console import Console

    from fullattn.segmentation.training.config import Config
    from fullattn.segmentation.training.fit import Result

__all__ = ["configure"]

_NEEDED = ("lightning", "timm", "tensorboard", "pydantic", "yaml", "PIL", "rich")

_EXAMPLES = """\
examples:
  fullattn train camvid_small --data data/camvid --output out/camvid
  fullattn train camvid_small --data data/camvid --output out/camvid --resume
  fullattn train camvid_small --data data/camvid --attention channel --seed 1 \\
      --set training.steps=1000 data.train=train+val data.val=null
  torchrun --nproc-per-node 8 -m fullattn train cityscapes --data data/cityscapes --output out/city

A configuration is one of those that come with fullattn (ade20k, camvid, camvid_small, cityscapes,
voc) or a YAML file of the same form. The output folder gets last.ckpt, best.ckpt, config.yaml, and
logs/ for TensorBoard. A run that was killed at any moment can be continued with --resume.
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn train`."""
    parser.description = "Train FLANet, or the same network with another attention, on a dataset."
    parser.epilog = _EXAMPLES
    parser.add_argument("config", metavar="CONFIG", help="name of a configuration, or a YAML file")
    parser.add_argument(
        "--data", type=Path, required=True, metavar="ROOT", help="folder of the dataset"
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
        help="skip unreadable files, and list them in skipped.txt",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not read all files before the first step"
    )
    override = parser.add_argument_group("settings that replace those of the configuration")
    override.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="any setting, the value in YAML: training.steps=100 data.val=null",
    )
    for key, meaning in (
        ("model.attention", "the attention layer"),
        ("training.seed", "of weights, order of images, augmentation and dropout"),
        ("training.accumulate", "forward and backward passes in a step, for less memory"),
        ("training.precision", "32-true, 64-true, 16-mixed or bf16-mixed"),
        ("training.strategy", "auto, ddp or fsdp"),
    ):
        option = "--" + key.partition(".")[2]
        override.add_argument(option, dest=key, metavar="VALUE", help=f"{key}: {meaning}")
    machines = parser.add_argument_group("machines")
    machines.add_argument(
        "--devices",
        type=count,
        help="GPUs or CPU processes on each machine (all GPUs, or one CPU process)",
    )
    machines.add_argument("--nodes", type=count, help="number of machines (1)")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    need_packages("training", "train", *_NEEDED)
    config = _config(args)  # before the slow imports
    from lightning.pytorch.utilities import rank_zero_only
    from rich.console import Console

    from fullattn.checkpoints import CheckpointError
    from fullattn.segmentation.data import DataError
    from fullattn.segmentation.training.config import ConfigError
    from fullattn.segmentation.training.module import NonFiniteError
    from fullattn.segmentation.training.train import train

    for name in ("lightning.pytorch", "lightning.fabric"):  # no advertisements
        logging.getLogger(name).setLevel(logging.WARNING)
    console = rank_zero_only(Console)(soft_wrap=True)  # None in other processes
    if console and not args.resume and args.output.is_dir() and any(args.output.iterdir()):
        raise UsageError(
            f"expected an empty or new output folder, and {str(args.output)!r} holds files: "
            "continue its run with --resume, or name another with --output"
        )
    with output_folder(args.output):
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
        except (CheckpointError, ConfigError, DataError, NonFiniteError) as error:
            raise UsageError(str(error)) from error
        except KeyboardInterrupt:
            hint = f"continue from {args.output / 'last.ckpt'} with --resume"
            print(f"fullattn: interrupted; {hint}", file=sys.stderr)  # noqa: T201
            raise SystemExit(130) from None
    if console is not None:
        _report(result, args.output, console)


def _config(args: argparse.Namespace) -> Config:
    from fullattn.segmentation.training.config import read

    settings = {name: value for name, value in vars(args).items() if "." in name}
    overrides = [f"{name}={value}" for name, value in settings.items() if value is not None]
    with sentences():
        return read(args.config, [*args.set, *overrides])


def _report(result: Result, output: Path, console: Console) -> None:
    scores = "" if result.scores is None else f", val mIoU {result.scores.mean_iou:.4f}"
    lines = [f"step {result.step}: {result.checkpoint}{scores}"]
    if result.best is not None:
        path, mean = result.best
        lines.append(f"best: {path}, val mIoU {mean:.4f}")
    if result.skipped:
        listed = f"listed in {output / 'skipped.txt'}:"
        lines += [f"{len(result.skipped)} files were skipped, {listed}", *result.skipped[:10]]
    console.print("\n".join(lines), markup=False, highlight=False)
