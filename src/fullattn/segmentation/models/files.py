"""A trained network in a file, together with what is needed to use it.

The file is a dict that `torch.load(weights_only=True)` reads: "state_dict" with the network's
tensors below "model.", and "fullattn" with a description of plain values: the network's arguments,
the data set's classes, palette and groups, and how images are normalised. Checkpoints of
`fullattn train` are such files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn

from fullattn.checkpoints import CheckpointError
from fullattn.checkpoints.files import contents
from fullattn.segmentation.models.flanet import FLANet

__all__ = ["Description", "Trained", "describe", "load"]

_PREFIX = "model."
_FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What is needed to build a trained network again and to use it.

    Attributes:
        model: the arguments of FLANet.
        dataset: name of the data set.
        classes: names of the classes, by index.
        palette: a colour for each, (red, green, blue) from 0 to 255.
        groups: named groups of classes.
        mean: of images in 0 to 1, for each colour.
        std: their standard deviation.
        step: steps of training behind it.
        format: of this description.
    """

    model: Mapping[str, Any]
    dataset: str
    classes: Sequence[str]
    palette: Sequence[Sequence[int]]
    groups: Mapping[str, Sequence[str]]
    mean: Sequence[float]
    std: Sequence[float]
    step: int = 0
    format: int = field(default=_FORMAT)

    def plain(self) -> dict[str, Any]:
        """The same as plain values, for the file."""
        return {
            **asdict(self),
            "model": _plain(self.model),
            "classes": list(self.classes),
            "palette": [[int(value) for value in colour] for colour in self.palette],
            "groups": {name: list(members) for name, members in self.groups.items()},
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
        }


@dataclass(frozen=True)
class Trained:
    """A network in evaluation mode and its description."""

    model: nn.Module
    description: Description


def _plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def describe(model: FLANet) -> dict[str, Any]:
    """The arguments of a FLANet as plain values.

    Args:
        model: the network.

    Returns:
        What `FLANet(**arguments)` builds the same architecture from.

    Raises:
        ValueError: it was built with a callable, which a file cannot hold.
    """
    arguments = dict(model.arguments)
    if arguments["norm_layer"] is nn.BatchNorm2d:  # what it is without the argument
        del arguments["norm_layer"]
    for name, value in arguments.items():
        if not _is_plain(value):
            raise ValueError(f"a file cannot hold {name}={value!r}; names and numbers it can")
    plain: dict[str, Any] = _plain(arguments)
    return plain


def load(path: str | os.PathLike[str]) -> Trained:
    """Read a trained network from a file, on the CPU, without running anything that is in it.

    Args:
        path: of the file.

    Returns:
        The network in evaluation mode and its description.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: damaged, not a file of this kind, or its tensors are not those of the
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
            f"{path} names {len(description.classes)} classes for a network of {model.num_classes}"
        )
    weights = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in found["state_dict"].items()
        if name.startswith(_PREFIX)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(
            f"{path} does not hold the tensors of the network that it describes: {reason[:300]}"
        ) from error
    return Trained(model.eval(), description)
