"""Arguments of `fullattn evaluate`."""

from __future__ import annotations

from pathlib import Path

from fullattn._cli import arguments
from fullattn._cli.arguments import Parser

__all__ = ["configure"]

_EVALUATE_EXAMPLES = """\
examples:
  fullattn evaluate last.ckpt --data camvid data/camvid
  fullattn evaluate last.ckpt --data camvid data/camvid --only 'Seq05VD*' \\
      --output unseen.json
  fullattn evaluate last.ckpt --data cityscapes data/cityscapes --split val \\
      --device cuda --precision bfloat16 --scales 0.5 0.75 1 1.25 1.5 1.75 \\
      --flip --window 769x769
"""


def configure(parser: Parser) -> None:
    """Add the arguments of `fullattn evaluate`."""
    parser.description = (
        "Segment the images of a dataset and compare with its masks: IoU of each class, means over "
        "all, over thin and over large classes, and accuracies."
    )
    parser.epilog = _EVALUATE_EXAMPLES
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of `fullattn train`")
    data = "dataset (cityscapes, ade20k, voc, camvid, folder) and its folder"
    add("--data", nargs=2, required=True, metavar=("NAME", "ROOT"), help=data)
    add("--split", default="test", metavar="SPLIT", help="test, val, train or train+val (test)")
    add("--only", metavar="GLOB", help="only images whose file name matches, as 'Seq05VD*'")
    add("--skip-bad", action="store_true", help="leave out and list files that cannot be read")
    add("--output", type=Path, metavar="FILE.json", help="write the scores there too")
    arguments.add_passes(parser)
    how = parser.add_argument_group("execution")
    arguments.add_device(how)
    add = how.add_argument
    precisions = ("float32", "bfloat16", "float16")
    precision = "precision of convolutions and products (float32)"
    add("--precision", choices=precisions, default="float32", help=precision)
    batch, workers = "images of one size per batch (1)", "processes that read files (0)"
    add("--batch-size", type=arguments.count, default=1, metavar="N", help=batch)
    add("--workers", type=arguments.index, default=0, metavar="N", help=workers)
    parser.set_defaults(run="fullattn.segmentation.evaluation.command:evaluate")
