"""Changes as plain data: what `swap` or `insert` did, written to a file and made again.

A record holds the layer's class and options, and of each site its name, its module's class, its
channels and a digest of the shapes of its parameters. The class of the model and a digest of the
names in it tell its architecture. Of what a record names, nothing but subclasses of
`torch.nn.Module` is used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fullattn._files import write_atomically
from fullattn._version import __version__
from fullattn.layers import LAYERS

if TYPE_CHECKING:
    from fullattn.swap.report import Report

__all__ = [
    "architecture",
    "decode",
    "layer_class",
    "parameter_shapes",
    "read",
    "record",
    "write",
]

_FORMAT = 1


def architecture(model: nn.Module) -> dict[str, Any]:
    """Describe a model by its class and the names of its modules.

    Of a class the name alone counts, since libraries move classes between modules.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return {"class": type(model).__qualname__, "modules": len(names), "names": _digest(names)}


def parameter_shapes(model: nn.Module, name: str) -> str:
    """Digest the shapes of a module's parameters, or of the nearest one around it that has any."""
    while True:
        shapes = [f"{n} {tuple(p.shape)}" for n, p in model.get_submodule(name).named_parameters()]
        if shapes or not name:
            return _digest(shapes)
        name = name.rpartition(".")[0]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def record(report: Report) -> dict[str, Any]:
    """Describe the changes of a report as JSON values.

    Raises:
        ValueError: the layer is no class that can be imported, or an option is no JSON value.
    """
    replacement: Any = report.replacement
    options = dict(report.options)
    while isinstance(replacement, partial) and not replacement.args:
        replacement, options = replacement.func, {**replacement.keywords, **options}
    try:
        layer = _encode_class(replacement)
        encoded = {name: _encode(value) for name, value in options.items()}
    except ValueError as error:
        raise ValueError(f"cannot save this {report.action}: {error}") from error
    return {
        "format": _FORMAT,
        "fullattn": __version__,
        "torch": str(torch.__version__),
        "model": report.architecture,
        report.action: layer,
        "options": encoded,
        "at": [
            {
                "name": change.name,
                "module": type(change.old).__qualname__,
                "in_channels": change.in_channels,
                "out_channels": change.out_channels,
                "input": list(change.input),
                "parameters": change.parameter_shapes,
                **(
                    {}
                    if change.insertion is None
                    else {
                        "home": list(change.insertion.home.path),
                        "hooked": change.insertion.home.hooked,
                    }
                ),
            }
            for change in report.changes
        ],
    }


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report's record as JSON; the file exists completely or not at all."""
    text = json.dumps(record(report), indent=2) + "\n"
    write_atomically(Path(path), text.encode())


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Read a record and check that this version of the package understands it.

    Raises:
        ValueError: no record, or one of a newer version.
        OSError: the file cannot be read.
    """
    if isinstance(source, Mapping):
        where, found = "the record", dict(source)
    else:
        where = repr(os.fspath(source))
        try:
            found = json.loads(Path(source).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"cannot replay {where}: not a saved change ({error})") from error
    if not _is_record(found):
        raise ValueError(f"cannot replay {where}: expected a change saved by Report.save")
    if found["format"] != _FORMAT or _numbers(found["fullattn"]) > _numbers(__version__):
        raise ValueError(
            f"cannot replay {where}: it was saved by fullattn {found['fullattn']} (format "
            f"{found['format']}), and this is fullattn {__version__} (format {_FORMAT})"
        )
    return found


def _is_record(found: Any) -> bool:
    """Whether a value has the form that `record` returns."""
    if not isinstance(found, dict) or len({"insert", "swap"} & set(found)) != 1:
        return False
    model, options, at = (found.get(key) for key in ("model", "options", "at"))
    return (
        {"format", "fullattn"} <= set(found)
        and isinstance(model, dict)
        and {"class", "modules", "names"} <= set(model)
        and isinstance(options, dict)
        and isinstance(at, (list, tuple))
        and bool(at)
        and all(isinstance(each, dict) and _is_site(each, "insert" in found) for each in at)
    )


def _is_site(at: dict[str, Any], inserted: bool) -> bool:
    sizes = [at.get("in_channels"), at.get("out_channels"), *(at.get("input") or ())]
    return (
        len(sizes) == 6
        and all(type(size) is int and size > 0 for size in sizes)
        and {"name", "module", "parameters"} <= set(at)
        and (not inserted or (isinstance(at.get("home"), list) and "hooked" in at))
    )


def _numbers(version: Any) -> list[int]:
    """Return major and minor version."""
    return [int(part) for part in str(version).split(".")[:2] if part.isdigit()]


def layer_class(name: Any) -> type[nn.Module]:
    """Import a layer's class: one of this package's by its name alone, or "package.module.Class".

    Raises:
        ValueError: there is none.
    """
    for layer in LAYERS.values():
        if name in (layer.__name__, layer.layer_name):
            return layer
    return _import_class(name)


def decode(value: Any) -> Any:
    """Return the option that was encoded as a JSON value.

    Raises:
        ValueError: a class cannot be imported.
    """
    if isinstance(value, dict) and set(value) == {"class"}:
        return _import_class(value["class"])
    if isinstance(value, dict) and set(value) == {"class", "args", "options"}:
        options = {name: decode(each) for name, each in value["options"].items()}
        return partial(_import_class(value["class"]), *map(decode, value["args"]), **options)
    if isinstance(value, dict) and set(value) == {"tuple"}:
        return tuple(map(decode, value["tuple"]))
    if isinstance(value, list):
        return [decode(each) for each in value]
    return value


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encode(each) for each in value]}
    if isinstance(value, list):
        return [_encode(each) for each in value]
    if isinstance(value, partial):
        options = {name: _encode(each) for name, each in value.keywords.items()}
        args = [_encode(each) for each in value.args]
        return {"class": _encode_class(value.func), "args": args, "options": options}
    if isinstance(value, type):
        return {"class": _encode_class(value)}
    raise ValueError(f"expected options of JSON values or module classes, got {value!r}")


def _encode_class(value: Any) -> str:
    if not (isinstance(value, type) and issubclass(value, nn.Module)):
        raise ValueError(f"expected a module class that can be imported by name, got {value!r}")
    if value in LAYERS.values() and value.__module__.partition(".")[0] == "fullattn":
        return value.__name__
    name = f"{value.__module__}.{value.__qualname__}"
    if _import_class(name) is not value:
        raise ValueError(f"expected a module class that can be imported by name, got {value!r}")
    return name


def _import_class(name: Any) -> type[nn.Module]:
    for module, path in _splits(str(name)):
        try:
            found = reduce(getattr, path, import_module(module))
        except (ImportError, AttributeError):
            continue
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ValueError(f"expected a subclass of torch.nn.Module that can be imported, got {name!r}")


def _splits(name: str) -> Iterator[tuple[str, list[str]]]:
    """Split a dotted name into a module's and a path within it, the longest module first."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        yield ".".join(parts[:length]), parts[length:]
