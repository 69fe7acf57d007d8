"""Arguments of `fullattn train`."""

from __future__ import annotations

from pathlib import Path

from fullattn._cli.arguments import Parser, count

__all__ = ["configure"]

_NEEDED = ("lightning", "timm", "tensorboard", "pydantic", "yaml", "PIL", "rich")

_EXAMPLES = """\
examples:
  fullattn train camvid_small --data data/camvid --output out/camvid
  fullattn train camvid_small --data data/camvid --output out/camvid --resume
  fullattn train camvid_small --data data/camvid --attention channel --seed 1 \\
      --set training.steps=1000 data.train=train+val data.val=null
  torchrun --nproc-per-node 8 -m fullattn train cityscapes \\
      --data data/cityscapes --output out/city

A configuration is one of those that come with fullattn (ade20k, camvid,
camvid_small, cityscapes, voc) or a YAML file of the same form. The output
folder gets last.ckpt, best.ckpt, config.yaml, and logs/ for TensorBoard. A run
that was killed at any moment can be continued with --resume.
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
    parser.set_defaults(
        run="fullattn.segmentation.training.command:run", needs=("training", "train", *_NEEDED)
    )
