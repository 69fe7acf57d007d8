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

from fullattn._cli.arguments import words
from fullattn._cli.conditions import environment, parse_device
from fullattn._cli.errors import UsageError, sentences
from fullattn._cli.loading import layer_named
from fullattn._cli.output import written_together
from fullattn._cli.terminal import doing, progress
from fullattn.layers import LAYERS

if TYPE_CHECKING:
    from fullattn.segmentation.models.files import Trained

__all__ = ["evaluate", "maps", "predict"]


def _chosen(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _passes(args: argparse.Namespace) -> dict[str, Any]:
    """Collect and check the options of `segment`."""
    from fullattn.segmentation.evaluation.passes import check_options

    passes = {**_chosen(args, "flip", "window", "stride"), "scales": tuple(args.scales)}
    with sentences():
        check_options(**passes)
    return passes


def evaluate(args: argparse.Namespace) -> None:
    """Run `fullattn evaluate`."""
    passes = _passes(args)
    device = parse_device(args.device)
    if args.output is not None and args.output.is_dir():
        raise UsageError(f"expected a file for --output, got the folder {str(args.output)!r}")
    trained = _read_trained(args.checkpoint)
    description = trained.description
    name, root = args.data
    with doing(f"fullattn evaluate: listing {name} {args.split}"), sentences():
        from rich.console import Console

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
        with progress(len(dataset), "images") as advance:
            scores = evaluate(
                trained.model,
                dataset,
                mean=description.mean,
                std=description.std,
                device=device,
                progress=lambda images: advance(images, ""),
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


def predict(args: argparse.Namespace) -> None:
    """Run `fullattn predict`."""
    if args.maps != (args.point is not None or args.channel is not None):
        point = "--point X,Y or --channel C with --maps"
        raise UsageError(f"expected {point if args.maps else '--maps with --point and --channel'}")
    passes = _passes(args)
    device = parse_device(args.device)
    trained = _read_trained(args.checkpoint)
    with sentences():
        from rich.console import Console

        from fullattn.segmentation.evaluation.predict import predict
    made: list[Path] = []
    with written_together(args.output) as folder, sentences():
        options = _chosen(args, "alpha", "labels", "point", "channel")
        with progress(len(args.photographs), "photographs") as advance:
            for paths in predict(
                trained, args.photographs, folder, device=device, **options, **passes
            ):
                made += [args.output / path.name for path in paths]
                advance(1, "")
    for path in made:
        Console().print(path, markup=False, highlight=False, soft_wrap=True)


def _read_trained(path: Path) -> Trained:
    """Read a file of `fullattn train`; raise a UsageError if it is not one."""
    with doing(f"fullattn: reading {path}"), sentences():
        from fullattn.segmentation.models.files import load

        try:
            return load(path)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UsageError(
                f"expected a checkpoint that can be read at {str(path)!r}: {reason}"
            ) from error


def maps(args: argparse.Namespace) -> None:
    """Run `fullattn maps`."""
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
    layers = list(dict.fromkeys(map(layer_named, words(args.layers or list(LAYERS)))))
    with doing(f"fullattn maps: reading {args.photograph}"), sentences():
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
    with (
        written_together(args.output) as folder,
        doing("fullattn maps: drawing"),
        sentences(),
    ):
        written = maps.write(seen, photograph, folder, point=args.point, channel=args.channel)
    for path in written:
        print(args.output / path.name)  # noqa: T201
