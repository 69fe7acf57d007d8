"""The commands `fullattn evaluate`, `fullattn predict` and `fullattn maps`.

Slow imports are deferred until a command runs.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullattn._cli import arguments
from fullattn._cli.arguments import Parser
from fullattn._cli.conditions import environment, parse_device
from fullattn._cli.errors import UsageError, describe, sentences
from fullattn._cli.loading import layer_named
from fullattn._cli.output import written_together
from fullattn.layers import LAYERS

if TYPE_CHECKING:
    from fullattn.segmentation.models.files import Trained

__all__ = ["configure_evaluate", "configure_maps", "configure_predict"]

_EVALUATE_EXAMPLES = """\
examples:
  fullattn evaluate last.ckpt --data camvid data/camvid
  fullattn evaluate last.ckpt --data camvid data/camvid --only 'Seq05VD*' --output unseen.json
  fullattn evaluate last.ckpt --data cityscapes data/cityscapes --split val --device cuda \\
      --scales 0.5 0.75 1 1.25 1.5 1.75 --flip --window 769x769 --precision bfloat16
"""

_PREDICT_EXAMPLES = """\
examples:
  fullattn predict street.jpg --checkpoint last.ckpt --output out
  fullattn predict street.jpg --checkpoint last.ckpt --output out --maps --point 320,240
  fullattn predict photos/*.jpg --checkpoint last.ckpt --output out --labels --scales 0.75 1 1.25
"""

_MAPS_EXAMPLES = """\
examples:
  fullattn maps street.jpg
  fullattn maps street.jpg --point 320,240 --channel 5 --output out/street
  fullattn maps street.jpg --checkpoint last.ckpt
  fullattn maps street.jpg --backbone resnet50
  fullattn maps street.jpg --layers fully --scale 1
"""


# Kinds of values that several options take.
_FILE: Any = {"type": Path, "metavar": "FILE"}
_FOLDER: Any = {"type": Path, "metavar": "DIR"}
_POINT: Any = {"type": arguments.point, "metavar": "X,Y"}
_CHANNEL: Any = {"type": arguments.index, "metavar": "C"}
_SIZE: Any = {"type": arguments.size, "metavar": "HxW"}


def configure_evaluate(parser: Parser) -> None:
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
    _add_passes(parser)
    how = parser.add_argument_group("execution")
    arguments.add_device(how)
    add = how.add_argument
    precisions = ("float32", "bfloat16", "float16")
    precision = "precision of convolutions and products (float32)"
    add("--precision", choices=precisions, default="float32", help=precision)
    batch, workers = "images of one size per batch (1)", "processes that read files (0)"
    add("--batch-size", type=arguments.count, default=1, metavar="N", help=batch)
    add("--workers", type=arguments.index, default=0, metavar="N", help=workers)
    parser.set_defaults(run=_evaluate)


def configure_predict(parser: Parser) -> None:
    """Add the arguments of `fullattn predict`."""
    parser.description = (
        "Segment photographs and draw the classes in colour over them, with a legend; optionally "
        "write the labels and the similarity maps of the attention layer."
    )
    parser.epilog = _PREDICT_EXAMPLES
    add = parser.add_argument
    add("photographs", nargs="+", type=Path, metavar="PHOTO")
    add("--checkpoint", **_FILE, required=True, help="a file of `fullattn train`")
    add("--output", **_FOLDER, required=True, help="folder of the written images")
    add("--alpha", type=arguments.number, default=0.5, help="opacity of the colours, 0 to 1 (0.5)")
    add("--labels", action="store_true", help="write PHOTO_labels.png, the class indices, too")
    maps = parser.add_argument_group("similarity maps of the attention layer")
    maps.add_argument("--maps", action="store_true", help="draw them, at a point or a channel")
    where = maps.add_mutually_exclusive_group()
    where.add_argument("--point", **_POINT, help="pixel, from the top left")
    where.add_argument("--channel", **_CHANNEL, help="index of a channel, from 0")
    _add_passes(parser)
    arguments.add_device(parser)
    parser.set_defaults(run=_predict)


def configure_maps(parser: Parser) -> None:
    """Add the arguments of `fullattn maps`."""
    parser.description = (
        "Draw each layer's similarity maps for a photograph: the positions that a pixel attends "
        "to, the channels that a channel attends to, and the maps of a column and a row beside the "
        "channel layer's only map. Writes PHOTO_LAYER.png for each layer, and PHOTO_maps.html, a "
        "page in which a click on the photograph moves the point. Without --checkpoint, untrained "
        "layers compare the features without learned weights."
    )
    parser.epilog = _MAPS_EXAMPLES
    add = parser.add_argument
    add("photograph", type=Path, metavar="PHOTO")
    add("--output", **_FOLDER, default=Path("out/maps"), help="(out/maps)")
    add("--point", **_POINT, help="pixel of the photograph, from its top left corner (the centre)")
    add("--channel", **_CHANNEL, help="also draw the channels that this channel attends to")
    longest = "a photograph with a longer side is scaled down to this (512)"
    add("--longest", type=arguments.count, default=512, metavar="PIXELS", help=longest)
    source = parser.add_argument_group("source of the layers").add_mutually_exclusive_group()
    add = source.add_argument
    add("--checkpoint", **_FILE, help="draw the layers of a network of `fullattn train`")
    backbone = "use features of a timm network, with downloaded weights (a random stem)"
    add("--backbone", metavar="NAME", help=backbone)
    add = parser.add_argument_group("untrained layers").add_argument
    add("--weights", **_FILE, help="the backbone's weights, instead of a download")
    add("--layers", nargs="+", metavar="LAYER", help=f"{', '.join(LAYERS)} (all)")
    scale = "factor on the scores; the papers use 1 (4/d, softer)"
    add("--scale", type=arguments.number, help=scale)
    add("--channels", type=arguments.count, metavar="C", help="channels of the random stem (64)")
    add("--seed", type=arguments.seed, help="of the random stem (0)")
    parser.set_defaults(run=_maps)


def _add_passes(parser: Parser) -> None:
    add = parser.add_argument_group("segmentation").add_argument
    scales = "average over images scaled by these factors (1)"
    add("--scales", nargs="+", type=arguments.number, default=[1.0], metavar="SCALE", help=scales)
    add("--flip", action="store_true", help="average over images and their mirror images")
    add("--window", **_SIZE, help="size in pixels of a sliding window")
    add("--stride", **_SIZE, help="step of the window (two thirds of it)")


def _chosen(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _passes(args: argparse.Namespace) -> dict[str, Any]:
    """Collect and check the options of `segment`."""
    from fullattn.segmentation.evaluation.passes import check_options

    passes = {**_chosen(args, "flip", "window", "stride"), "scales": tuple(args.scales)}
    with sentences():
        check_options(**passes)
    return passes


def _evaluate(args: argparse.Namespace) -> None:
    passes = _passes(args)
    device = parse_device(args.device)
    if args.output is not None and args.output.is_dir():
        raise UsageError(f"expected a file for --output, got the folder {str(args.output)!r}")
    trained = _read_trained(args.checkpoint)
    description = trained.description
    name, root = args.data
    with sentences():
        from rich.console import Console
        from rich.progress import Progress

        from fullattn.segmentation.data import open_dataset
        from fullattn.segmentation.evaluation.loop import evaluate
        from fullattn.segmentation.evaluation.scores import table

        dataset = open_dataset(name, root, args.split, skip_bad=args.skip_bad)
        if args.only is not None:
            dataset = dataset.select(args.only)
    if len(dataset.classes) != len(description.classes):
        raise UsageError(
            f"{args.checkpoint} was trained on {len(description.classes)} classes of "
            f"{description.dataset}, but {name} has {len(dataset.classes)}"
        )
    writable = nullcontext() if args.output is None else written_together(args.output.parent)
    with writable as folder, sentences():
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("images", total=len(dataset))
            scores = evaluate(
                trained.model,
                dataset,
                mean=description.mean,
                std=description.std,
                device=device,
                progress=lambda images: progress.advance(task, images),
                **_chosen(args, "batch_size", "workers", "precision", "skip_bad"),
                **passes,
            )
        console = Console()
        only = "" if args.only is None else f", {args.only}"
        title = f"{args.checkpoint.name} on {name}, {args.split}{only}: {scores.images} images"
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(table(scores))
        if list(dataset.classes) != list(description.classes):
            names = ", ".join(description.classes)
            warning = f"Warning: the checkpoint's classes have other names: {names}."
            console.print(warning, markup=False)
        if scores.skipped:
            console.print(f"{len(scores.skipped)} files were skipped:")
        for path in scores.skipped:
            console.print(f"  {path}", markup=False, soft_wrap=True)
        if folder is not None:
            report = {
                "checkpoint": str(args.checkpoint),
                "step": description.step,
                "network": dict(description.model),
                "data": {"name": name, "split": args.split, "only": args.only},
                "passes": passes,
                "precision": args.precision,
                "device": str(device),
                "environment": asdict(environment(device)),
                "scores": scores.as_dict(),
            }
            text = json.dumps(report, indent=1, allow_nan=False)
            (folder / args.output.name).write_text(f"{text}\n")


def _predict(args: argparse.Namespace) -> None:
    if args.maps != (args.point is not None or args.channel is not None):
        point = "--point X,Y or --channel C with --maps"
        raise UsageError(f"expected {point if args.maps else '--maps with --point and --channel'}")
    passes = _passes(args)
    device = parse_device(args.device)
    trained = _read_trained(args.checkpoint)
    with sentences():
        from rich.console import Console

        from fullattn.segmentation.evaluation.predict import predict
    with written_together(args.output) as folder, sentences():
        options = _chosen(args, "alpha", "labels", "point", "channel")
        written = predict(trained, args.photographs, folder, device=device, **options, **passes)
        made = [args.output / path.name for paths in written for path in paths]
    for path in made:
        Console().print(path, markup=False, highlight=False, soft_wrap=True)


def _read_trained(path: Path) -> Trained:
    """Read a file of `fullattn train`; raise a UsageError if it is not one."""
    with sentences():
        from fullattn.segmentation.models.files import load

        try:
            return load(path)
        except OSError as error:
            raise UsageError(
                f"expected a checkpoint that can be read at {str(path)!r}: {describe(error)}"
            ) from error


def _maps(args: argparse.Namespace) -> None:
    excluded = {
        "checkpoint": ("weights", "layers", "scale", "channels", "seed"),
        "backbone": ("channels", "seed"),
    }
    for source, names in excluded.items():
        for name in names:
            if getattr(args, source) is not None and getattr(args, name) is not None:
                raise UsageError(f"expected no --{name} with --{source}")
    if args.weights is not None and args.backbone is None:
        raise UsageError("expected --backbone NAME with --weights")
    layers = list(dict.fromkeys(map(layer_named, arguments.words(args.layers or list(LAYERS)))))
    with sentences():
        from fullattn.segmentation.evaluation import maps

        photograph = maps.read(args.photograph, args.longest)
        if args.point is not None:
            photograph.scale_point(args.point)
    if photograph.scaled:
        print(photograph.scaled)  # noqa: T201
    with sentences():
        if args.checkpoint is not None:
            seen = maps.of_network(_read_trained(args.checkpoint), photograph)
        elif args.backbone is not None:
            try:
                seen = maps.of_backbone(photograph, layers, args.backbone, args.weights, args.scale)
            except FileNotFoundError as error:
                raise UsageError(
                    f"expected weights at {str(args.weights)!r}: no such file"
                ) from error
        else:
            stem = args.channels or 64, args.scale, args.seed or 0
            seen = maps.of_stem(photograph, layers, *stem)
    with written_together(args.output) as folder, sentences():
        written = maps.write(seen, photograph, folder, point=args.point, channel=args.channel)
    for path in written:
        print(args.output / path.name)  # noqa: T201
