"""Reading a checkpoint from a file without running anything that is in it."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["CheckpointError", "contents", "load"]

# Where training programs put the weights among the other things that they save.
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
# How a pickle of protocol 2 begins: what torch.save writes unless told otherwise, and the only one
# that weights_only=True reads.
_PROTOCOL_2 = b"\x80\x02"


class CheckpointError(ValueError):
    """A file that is not a checkpoint, is damaged, or needs more than reading weights."""


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a checkpoint, on the CPU, without running anything that is in it.

    Reads safetensors, and what `torch.save` writes (.pt, .pth) with `weights_only=True` alone; the
    contents tell which it is, not the name. Weights below "state_dict", "model_state_dict",
    "model", "module", "net", "network", "params" or "weights" are found there.

    Args:
        path: of the file.

    Returns:
        The state dict.

    Raises:
        CheckpointError: a directory, an empty or truncated file, one that is not a checkpoint, or
            one that holds code, objects of a program's own or anything but tensors.
        FileNotFoundError: there is no such file.
        ImportError: the file is safetensors, and the package for them is missing.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        ...     torch.save({"epoch": 3, "state_dict": {"gamma": torch.ones(1)}}, file.name)
        ...     load(file.name)
        {'gamma': tensor([1.])}
    """
    return _weights(Path(path), contents(path))


def contents(path: str | os.PathLike[str]) -> Any:
    """Read all that is in a file of weights, on the CPU, without running anything that is in it.

    Args:
        path: of the file.

    Returns:
        What was saved: tensors, and plain values in dicts and lists.

    Raises:
        CheckpointError: as in `load`, except that it need not be a state dict.
        FileNotFoundError: there is no such file.
        ImportError: the file is safetensors, and the package for them is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; expected the file of a checkpoint")
    with path.open("rb") as file:
        head = file.read(9)
        file.seek(0)
        if not head:
            raise CheckpointError(f"{path} is empty")
        try:
            return _reader(path, head)(path, file)
        except (CheckpointError, ImportError):
            raise
        except Exception as error:  # a damaged file makes its reader raise anything
            raise CheckpointError(_reason(path, error)) from error


def _reader(path: Path, head: bytes) -> Callable[[Path, BinaryIO], Any]:
    """What reads a file that begins so."""
    # The length of the header in 8 bytes, then its JSON. The format's own limit is 100 MB, which
    # eight characters of any text exceed.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000:
        return _read_safetensors
    if head.startswith(b"PK"):
        return _read_archive
    if head.startswith(_PROTOCOL_2[:1]):
        return _read_pickle
    raise CheckpointError(
        f"{path} is not a checkpoint: neither safetensors nor written by torch.save"
    )


def _read_safetensors(path: Path, file: BinaryIO) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"{path} holds safetensors, and the package is missing: "
            "pip install 'fullattn[checkpoints]'"
        ) from error
    return safetensors.torch.load_file(path)


def _read_archive(path: Path, file: BinaryIO) -> Any:
    archive = zipfile.ZipFile(file)
    names = {name.rpartition("/")[2]: name for name in archive.namelist()}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is refused: it is a TorchScript archive, which holds code; save its state dict"
        )
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is not a checkpoint: a zip archive not of torch.save")
    with archive.open(names["data.pkl"]) as data:
        _check_protocol(path, data.read(2))
    return _read_torch(file)


def _read_pickle(path: Path, file: BinaryIO) -> Any:
    _check_protocol(path, file.read(2))
    return _read_torch(file)


def _check_protocol(path: Path, head: bytes) -> None:
    if head != _PROTOCOL_2:
        raise CheckpointError(
            f"{path} is refused: only pickle protocol 2, which torch.save writes, can be read "
            f"without running code in the file, and this one begins with {head!r}"
        )


def _read_torch(file: BinaryIO) -> Any:
    file.seek(0)
    # The file and not its path, which torch.load judges by the name.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=False)


def _reason(path: Path, error: Exception) -> str:
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and foreign:
        return (
            f"{path} is refused: it needs {foreign[1]}, and a pickle that needs more than tensors "
            "can run any code; save its state dict alone where it comes from"
        )
    return f"{path} is truncated or damaged, or not a checkpoint at all"


def _weights(path: Path, found: Any) -> dict[str, Tensor]:
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
