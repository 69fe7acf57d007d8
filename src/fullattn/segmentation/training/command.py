"""The command `fullattn train`. Slow imports wait until it runs."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fullattn._cli.errors import UsageError, sentences
from fullattn._cli.output import output_folder
from fullattn._cli.terminal import doing

if TYPE_CHECKING:
    from rich.console import Console

    from fullattn.segmentation.training.config import Config
    from fullattn.segmentation.training.fit import Result

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Run `fullattn train`."""
    config = _config(args)  # before the slow imports
    with doing("fullattn train: importing Lightning"):
        from lightning.pytorch.utilities import rank_zero_only
        from rich.console import Console

        from fullattn.checkpoints import CheckpointError
        from fullattn.segmentation.data import DataError
        from fullattn.segmentation.training.config import ConfigError
        from fullattn.segmentation.training.module import NonFiniteError
        from fullattn.segmentation.training.train import train

    for name in ("lightning.pytorch", "lightning.fabric"):  # no advertisements
        logging.getLogger(name).setLevel(logging.WARNING)
    console = rank_zero_only(Console)()  # None in other processes
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
        _report(result, config, args.data, args.output, console)


def _config(args: argparse.Namespace) -> Config:
    from fullattn.segmentation.training.config import read

    settings = {name: value for name, value in vars(args).items() if "." in name}
    overrides = [f"{name}={value}" for name, value in settings.items() if value is not None]
    with sentences():
        return read(args.config, [*args.set, *overrides])


def _report(result: Result, config: Config, root: Path, output: Path, console: Console) -> None:
    scores = "" if result.scores is None else f", val mIoU {result.scores.mean_iou:.4f}"
    lines = [f"step {result.step}: {result.checkpoint}{scores}"]
    checkpoint = result.checkpoint
    if result.best is not None:
        checkpoint, mean = result.best
        lines.append(f"best: {checkpoint}, val mIoU {mean:.4f}")
    if result.skipped:
        listed = f"listed in {output / 'skipped.txt'}:"
        lines += [f"{len(result.skipped)} files were skipped, {listed}", *result.skipped[:10]]
    split = [] if config.data.val is None else ["--split", config.data.val]
    words = ["fullattn", "evaluate", str(checkpoint), "--data", config.data.name, str(root), *split]
    lines.append(f"next: {shlex.join(words)}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
