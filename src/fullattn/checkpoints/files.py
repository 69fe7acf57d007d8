"""Read a checkpoint without running code in it."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fullattn._text import installing

__all__ = ["CheckpointError", "contents", "load"]

# Keys under which training programs save the weights.
_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "params",
    "weights",
)
# The first bytes of a pickle of protocol 2, torch.save's default.
_PROTOCOL_2 = b"\x80\x02"


class CheckpointError(ValueError):
    """The file is not a checkpoint, is damaged, or contains more than weights."""


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a checkpoint, on the CPU, without running code in it.

    Reads safetensors, and what `torch.save` writes (.pt, .pth), with `weights_only=True`. The
    contents determine the format, not the name. Weights under "state_dict", "model_state_dict",
    "model", "module", "net", "network", "params" or "weights" are found there.

    Args:
        path: the file.

    Returns:
        The state dict.

    Raises:
        CheckpointError: a directory, an empty or truncated file, not a checkpoint, or one that
            contains code, custom objects or anything but tensors.
        FileNotFoundError: there is no such file.
        ImportError: a safetensors file, and the safetensors package is missing.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        ...     torch.save({"epoch": 3, "state_dict": {"gamma": torch.ones(1)}}, file.name)
        ...     load(file.name)
        {'gamma': tensor([1.])}
    """
    found = contents(path)
    if isinstance(found, Mapping):
        wrapped = (found[name] for name in _WRAPPERS if isinstance(found.get(name), Mapping))
        found = next(wrapped, found)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds no state dict but a {type(found).__name__}")
    if not found:
        raise CheckpointError(f"{path} holds no tensors")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} holds no state dict: expected names and tensors, got {name!r} with a "
                f"{type(tensor).__name__}"
            )
    return dict(found)


def contents(path: str | os.PathLike[str]) -> Any:
    """Read tensors and plain values as they were saved, on the CPU, without running code.

    Raises the errors of `load`, but the contents need not be a state dict.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; expected a checkpoint file")
    with path.open("rb") as file:
        try:
            return _read(path, file)
        except (CheckpointError, ImportError):
            raise
        except Exception as error:  # readers raise all sorts of exceptions on a damaged file
            foreign = re.search(r"GLOBAL (\S+)", str(error))
            if isinstance(error, pickle.UnpicklingError) and foreign:
                raise CheckpointError(
                    f"cannot load {path}: it needs {foreign[1]}, and a pickle of more than tensors "
                    "can run code; save only the state dict"
                ) from error
            raise CheckpointError(f"{path} is truncated or damaged, or not a checkpoint") from error


def _read(path: Path, file: BinaryIO) -> Any:
    head = file.read(9)
    if not head:
        raise CheckpointError(f"{path} is empty")
    # safetensors: the length of the header in 8 bytes, then its JSON. The length is limited to
    # 100 MB, which 8 characters of text exceed.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        try:
            import safetensors.torch
        except ImportError as error:
            raise ImportError(
                f"cannot load {path}: safetensors is missing: {installing('checkpoints')}"
            ) from error
        return safetensors.torch.load_file(path)
    protocol = head[:2]
    if protocol == b"PK":
        archive = zipfile.ZipFile(file)
        names = {name.rpartition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in names:
            raise CheckpointError(
                f"cannot load {path}: a TorchScript archive contains code; save its state dict"
            )
        if "data.pkl" not in names:
            raise CheckpointError(f"{path} is not a checkpoint: a zip archive not of torch.save")
        with archive.open(names["data.pkl"]) as data:
            protocol = data.read(2)
    elif head[:1] != _PROTOCOL_2[:1]:
        raise CheckpointError(
            f"{path} is not a checkpoint: neither safetensors nor written by torch.save"
        )
    if protocol != _PROTOCOL_2:
        raise CheckpointError(
            f"cannot load {path}: expected pickle protocol 2, the default of torch.save and the "
            f"only one that weights_only=True reads, got a file that begins with {protocol!r}"
        )
    file.seek(0)
    # The open file, because torch.load guesses the format from a path's suffix.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
