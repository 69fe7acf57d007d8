"""Keep inserted layers in the networks that Ultralytics builds, and build layers from its YAML.

Ultralytics builds a network from its YAML again when training starts. After `register()`

- rows of a YAML name the layers: `[-1, 1, FullyAttentional, []]`, with the channels of the layer
  before it, or `[-1, 1, FullyAttentional, [1024, {project: false}]]`, where 1024 is scaled as in
  every other row and checked, and a mapping holds the options;
- a top-level key `fullattn` inserts layers behind rows, whose numbers stay:
  `fullattn: [{layer: FullyAttentional, after: 9, options: {project: false}}]`;
- `fullattn.insert` and `swap` note their changes under that key, and training, resuming, exports
  and workers of distributed training have them;
- the layers count in `model.info()`, and `ULTRALYTICS_SAFE_LOAD` accepts them.

A checkpoint that holds a layer registers the integration when it is loaded. On the command line,
`fullattn yolo ...` is `yolo ...` with the integration.

Ultralytics is licensed under the AGPL-3.0; nothing else of this package imports it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fullattn import counters
from fullattn.attention.backend import ScoreFunction
from fullattn.layers import LAYERS
from fullattn.swap import recorded, shapes
from fullattn.swap.inserted import InsertedLayer
from fullattn.swap.operations import apply, replay_unkept
from fullattn.swap.rebuilt import Description
from fullattn.swap.report import Report
from fullattn.swap.targets import Site, find

__all__ = ["register"]

_KEY = "fullattn"  # top level of the YAML


def register() -> None:
    """Teach Ultralytics the layers; repeated calls add layers that were registered since.

    Raises:
        ImportError: ultralytics is not installed.

    Example:
        >>> register()  # doctest: +SKIP
        >>> yolo = YOLO("yolo11n.pt")  # doctest: +SKIP
        >>> fullattn.insert(  # doctest: +SKIP
        ...     yolo, fullattn.FullyAttentional, after="model.model.10", project=False
        ... )
        >>> yolo.train(data="coco8.yaml", epochs=3)  # doctest: +SKIP
    """
    from ultralytics.nn import tasks
    from ultralytics.utils import dist

    layers = {layer.__name__: layer for layer in LAYERS.values()}
    for name, layer in layers.items():
        row = type(name, (_Row,), {"__module__": "fullattn", "layer": layer})
        vars(tasks).setdefault(name, row)
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([*layers.values(), InsertedLayer, ScoreFunction])
    counters.register_counters(only=["thop"])
    if not _registered():
        tasks.parse_model = _parsing(tasks.parse_model)
        wrapper: Any = _wrapper_class()
        wrapper.train = _training(wrapper.train)
        dist.generate_ddp_file = _generating(dist.generate_ddp_file)


def _wrapper_class() -> Any:
    """Return the base class of `YOLO`."""
    from ultralytics.engine.model import Model

    return Model


def _registered() -> bool:
    from ultralytics.nn import tasks

    return hasattr(tasks.parse_model, "__wrapped__")


class _Row(nn.Module):
    """What `parse_model` calls for a row of the YAML; builds the layer.

    `parse_model` replaces strings among the arguments by its local variables of those names.
    """

    layer: ClassVar[Callable[..., nn.Module]]

    def __new__(cls, *given: Any) -> Any:
        if len(given) != 2:  # not the second of several repetitions
            args, ch, f, i, width, max_channels, own = given
            channels, options = _row_arguments(own, f"row {i} ({cls.__name__})")
            args[:] = [_input_channels(channels, ch, f, i, width, max_channels, cls), options]
            given = tuple(args)
        channels, options = given
        try:
            return cls.layer(channels, **{k: recorded.decode(v) for k, v in options.items()})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{cls.__name__} in the YAML: {error}") from error


def _row_arguments(own: Sequence[Any], row: str) -> tuple[int | None, dict[str, Any]]:
    """Split the arguments of a row into the stated channels, if any, and the options."""
    channels = own[0] if own and type(own[0]) is int else None
    rest = list(own[channels is not None :])
    options = rest.pop(0) if rest and isinstance(rest[0], Mapping) else {}
    if rest:
        raise ValueError(
            f"{row}: expected [], [channels] or [channels, {{option: value}}] as arguments, "
            f"got {list(own)}"
        )
    return channels, dict(options)


def _input_channels(
    stated: int | None, ch: Any, f: int, i: int, width: float, max_channels: float, cls: type
) -> int:
    """Return the channels of the row's input, and check what the row states."""
    from ultralytics.utils.ops import make_divisible

    channels = int(ch[f])
    if stated is not None:
        scaled = int(make_divisible(min(stated, max_channels) * width, 8))
        if channels not in (stated, scaled):
            raise ValueError(
                f"row {i} ({cls.__name__}): expected {channels} channels, those of its input, "
                f"got {stated} ({scaled} at this scale); leave the number out"
            )
    return channels


def _parsing(parse_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(parse_model)
    def parse(d: dict[str, Any], ch: int, verbose: bool = True) -> Any:
        names = {layer.__name__ for layer in LAYERS.values()}
        rows = []
        for number, (f, n, m, own) in enumerate((*d["backbone"], *d["head"])):
            if m in names:
                if not isinstance(f, int):
                    raise ValueError(f"row {number} ({m}): expected one input row, got {f}")
                own = ["args", "ch", "f", "i", "width", "max_channels", own]
            rows.append([f, n, m, own])
        split = len(d["backbone"])
        changes = d.get(_KEY) or ()
        d = {**d, "backbone": rows[:split], "head": rows[split:]}
        model, save = parse_model(d, ch, verbose)
        _make_changes(model, changes, ch, verbose)
        return model, save

    return parse


class _Network(nn.Module):
    """The rows of a network without its head, as they are called."""

    def __init__(self, rows: Iterable[nn.Module]) -> None:
        super().__init__()
        self.rows = nn.ModuleList(list(rows)[:-1])

    def forward(self, x: Any) -> Any:
        outputs: list[Any] = []
        for row in self.rows:
            f: Any = row.f
            if isinstance(f, int):
                x = x if f == -1 else outputs[f]
            else:
                x = [x if each == -1 else outputs[each] for each in f]
            x = row(x)
            outputs.append(x)
        return x


def _make_changes(rows: nn.Sequential, changes: Any, channels: int, verbose: bool) -> None:
    """Make the changes of the YAML's key in the rows of a network."""
    from ultralytics.utils import LOGGER

    if not isinstance(changes, (list, tuple)):
        raise ValueError(f"key {_KEY!r} in the YAML: expected a list, got {changes!r}")
    for number, change in enumerate(changes):
        where = f"key {_KEY!r} in the YAML, entry {number}"
        try:
            if isinstance(change, Mapping) and "format" in change:
                report = replay_unkept(rows, change, strict=False)
            else:
                report = _insert(rows, change, channels)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
        for made in report.changes:
            row: Any = rows.get_submodule(made.name.partition(".")[0])
            row.np = sum(p.numel() for p in row.parameters())  # as `parse_model` counted before
            if verbose:
                LOGGER.info(f"{_KEY}: row {made.layer_name}: {made.layer}")


def _insert(rows: nn.Sequential, change: Any, channels: int) -> Report:
    if not isinstance(change, Mapping) or not (
        {"layer", "after"} <= set(change) <= {"layer", "after", "options"}
    ):
        raise ValueError(
            "expected {layer: NAME, after: ROW} or {layer: NAME, after: ROW, options: {...}}, "
            f"got {change!r}"
        )
    sites = find(rows, str(change["after"]), outermost=False)
    check_change(rows, sites, "insert")
    observed = shapes.find_homes(_Network(rows), sites, torch.zeros(1, channels, 64, 64))
    options = {name: recorded.decode(v) for name, v in dict(change.get("options") or {}).items()}
    layer = recorded.layer_class(change["layer"])
    return apply("insert", rows, sites, layer, options, list(observed))


def _training(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def trained(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A network from a YAML is otherwise built again from the file.
        changes = getattr(self.model, "yaml", {}).get(_KEY) or ()
        if not self.ckpt and any("format" in change for change in changes):
            self.ckpt, self.ckpt_path = {"model": self.model}, None
        return train(self, *args, **kwargs)

    return trained


def _generating(generate: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(generate)
    def generated(*args: Any, **kwargs: Any) -> str:
        name = generate(*args, **kwargs)
        path = Path(name)
        path.write_text(
            f"import sys\nsys.path = {sys.path!r}\n"
            f"from {__name__} import register\nregister()\n" + path.read_text(encoding="utf-8"),
            encoding="utf-8",
        )
        return name

    return generated


def check_change(
    model: nn.Module, sites: Sequence[Site], action: Literal["swap", "insert"]
) -> None:
    """Refuse changes inside modules that Ultralytics' own code takes apart.

    Raises:
        ValueError: a site is in a head, whose modules are read by index, or is a convolution that
            `fuse()` joins with its normalisation.
    """
    verb = "insert after" if action == "insert" else "replace"
    for site in sites:
        for owner in _owners(model, site.name):
            kind = type(owner)
            if not kind.__module__.startswith("ultralytics."):
                continue
            if kind.__module__ == "ultralytics.nn.modules.head":
                raise ValueError(
                    f"cannot {verb} {site.name!r}: {kind.__name__} reads the modules inside it by "
                    "index; choose one of the rows before it"
                )
            if hasattr(owner, "bn") and site.module in owner.children():
                raise ValueError(
                    f"cannot {verb} {site.name!r}: {kind.__name__} is fused into one convolution; "
                    f"choose {site.name.rpartition('.')[0]!r}"
                )


def _owners(model: nn.Module, name: str) -> Iterable[nn.Module]:
    """Return the modules around one, and itself if it is a head."""
    parts = name.split(".")
    for length in range(len(parts) + 1):
        module = model.get_submodule(".".join(parts[:length]))
        if length < len(parts) or type(module).__module__ == "ultralytics.nn.modules.head":
            yield module


def replace(old: nn.Module, new: nn.Module) -> None:
    """Give the replacement of a row the row's number, inputs and name."""
    if type(vars(old).get("i")) is int and "f" in vars(old):
        for name in ("i", "f", "type", "np"):
            setattr(new, name, vars(old)[name])


def description(model: nn.Module) -> Description | None:
    """Return the changes in the YAML of a network of Ultralytics, or of a `YOLO` that holds one."""
    from ultralytics.nn.tasks import BaseModel

    network, prefix = model, ""
    if isinstance(model, _wrapper_class()):
        network, prefix = model.model, "model."
    yaml: Any = getattr(network, "yaml", None)
    if not isinstance(network, BaseModel) or not isinstance(yaml, dict):
        if any({"i", "f", "type"} <= set(vars(child)) for child in model.children()):
            return Description([], "", "rows alone have no YAML: change the YOLO or its .model")
        return None
    warning = None
    if not _registered():
        warning = (
            f"training will build {type(network).__name__} again from its YAML, without this "
            f"change; call {__name__}.register() first"
        )
    changes = yaml.get(_KEY)
    if not isinstance(changes, list):
        changes = yaml[_KEY] = []
    return Description(changes, prefix + "model.", warning)
