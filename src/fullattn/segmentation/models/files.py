"""Files of trained networks with a description of the network and its data.

The file is a dict that `torch.load(weights_only=True)` reads: "state_dict" with the network's
tensors under the prefix "model.", and "fullattn" with the description as plain values: the
network's arguments, the dataset's classes, palette and groups, and the normalisation of images.
`fullattn train` writes such files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from fullattn.checkpoints import CheckpointError
from fullattn.checkpoints.files import contents
from fullattn.segmentation.models.backbone import load_state_dict
from fullattn.segmentation.models.flanet import FLANet

__all__ = ["Description", "Trained", "describe", "load"]

_PREFIX = "model."
_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """A description from which a trained network is rebuilt and used.

    Attributes:
        model: the arguments of FLANet.
        dataset: name of the dataset.
        classes: names of the classes, by index.
        palette: a colour for each, (red, green, blue) from 0 to 255.
        groups: names of classes by the name of their group.
        mean: mean of each colour of images in 0..1.
        std: their standard deviation.
        step: number of training steps.
        format: version of the description.
    """

    model: Mapping[str, Any]
    dataset: str
    classes: Sequence[str]
    palette: Sequence[Sequence[int]]
    groups: Mapping[str, Sequence[str]]
    mean: Sequence[float]
    std: Sequence[float]
    step: int = 0
    format: int = _FORMAT

    def plain(self) -> dict[str, Any]:
        """Return the description as dicts, lists, numbers and strings, for the file."""
        return dict(_plain(asdict(self)))


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode and its description."""

    model: nn.Module
    description: Description


def _plain(value: Any) -> Any:
    """Convert mappings and sequences to dicts and lists, and refuse all but names and numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{value!r}: expected names and numbers")


def describe(model: FLANet) -> dict[str, Any]:
    """Return plain values with which `FLANet(**arguments)` has the architecture of a network.

    Raises:
        ValueError: an argument is a callable, which a file cannot hold.
    """
    arguments = dict(model.arguments)
    if arguments["norm_layer"] is nn.BatchNorm2d:  # the default
        del arguments["norm_layer"]
    plain = {}
    for name, value in arguments.items():
        try:
            plain[name] = _plain(value)
        except ValueError as error:
            raise ValueError(f"a file cannot hold {name}={error}") from error
    return plain


def load(path: str | os.PathLike[str]) -> Trained:
    """Read a trained network from a file to the CPU, without executing code from the file.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is damaged, not of this kind, or its tensors do not fit the
            network that it describes.
        ImportError: the network's backbone needs timm, which is not installed.
    """
    found = contents(path)
    described = found.get("fullattn") if isinstance(found, dict) else None
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} does not describe its network: expected a file of `fullattn train`"
        )
    names = {entry.name for entry in fields(Description)}
    try:
        description = Description(**{k: v for k, v in described.items() if k in names})
        model = FLANet(**description.model)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} describes a network that cannot be built: {error}"
        ) from error
    if len(description.classes) != model.num_classes:
        raise CheckpointError(
            f"{path} is inconsistent: expected {model.num_classes} class names, "
            f"got {len(description.classes)}"
        )
    weights = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in found["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    load_state_dict(model, weights, path)
    return Trained(model.eval(), description)
