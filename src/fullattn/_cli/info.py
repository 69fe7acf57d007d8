"""`fullattn info`: say which backend runs, and why the others do not."""

from __future__ import annotations

import argparse
import platform
import shutil
import textwrap
from importlib import metadata
from typing import Any

import einops
import torch

from fullattn import costs
from fullattn._cli.arguments import words
from fullattn._cli.conditions import device_name, parse_device
from fullattn._cli.errors import UsageError
from fullattn._cli.loading import layer_named
from fullattn._cli.shapes import parse_shape
from fullattn._text import counted, installing
from fullattn._version import __version__
from fullattn.attention import dispatch
from fullattn.layers import LAYERS

__all__ = ["run"]

_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}
_EXTRA = ("rich", "matplotlib", "pillow")


def run(args: argparse.Namespace) -> None:
    """Run `fullattn info`."""
    shape = parse_shape(args.shape)
    dtype = getattr(torch, args.dtype)
    device = parse_device(args.device)
    layers = [layer_named(layer) for layer in words(args.layer or LAYERS)]
    lines = [
        f"fullattn {__version__}, torch {torch.__version__}, "
        f"einops {einops.__version__}, Python {platform.python_version()}",
        f"device: {device}, {device_name(device)}"
        + (f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""),
        f"benchmark: {_versions('bench', *_EXTRA)}",
        f"training: {_versions('train', 'timm', 'torchvision', 'lightning', 'torchmetrics')}",
        f"GPU kernels: {_versions('triton', 'triton')}",
        "backends:",
        *(f"  {entry.name:<13} {entry.summary}" for entry in dispatch.BACKENDS),
        "layers:",
        *(f"  {name:<13} {layer.__name__}, {layer.paper}" for name, layer in LAYERS.items()),
    ]
    running = []
    for layer in layers:
        lines += ["", f"{LAYERS[layer].__name__} at {shape}, {args.dtype}, {device}:"]
        try:
            explained = dispatch.explain(
                costs.inputs_of(
                    LAYERS[layer](shape.channels, device="meta"), (*shape,), dtype, device.type
                )
            )
        except ValueError as error:  # FULLATTN_BACKEND does not name a backend
            raise UsageError(str(error)) from error
        lines += [f"  {entry.name:<13} {sentence}" for entry, sentence in explained]
        running += [
            f"{LAYERS[layer].__name__} on {entry.name}"
            for entry, sentence in explained
            if sentence.startswith("runs:")
        ]
    lines += ["", f"At {shape}, {args.dtype}, {device}: {', '.join(running) or 'nothing runs'}."]
    width = shutil.get_terminal_size().columns
    for line in lines:  # of two columns
        left = 16 if line.startswith("  ") else 4
        rows = textwrap.wrap(line, width, subsequent_indent=" " * left, **_WHOLE_WORDS) or [""]
        print("\n".join(rows))  # noqa: T201


def _versions(extra: str, *names: str) -> str:
    versions = []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            return f"{name} is missing: {installing(extra)}"
    return ", ".join(versions)
