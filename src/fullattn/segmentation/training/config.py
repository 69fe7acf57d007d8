"""What a training run is made of, read from YAML and checked before anything else is done.

A configuration has three sections, and every key of the three dataclasses below is one of a file's
keys. A key without a default must be there; a key that is not known, a value of another type or out
of range is an error that names the key and the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "TrainingConfig",
    "differences",
    "names",
    "read",
]

PRECISIONS = ("32-true", "64-true", "16-mixed", "bf16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the file."""


def _key(allowed: Callable[[Any], bool], expected: str, **options: Any) -> Any:
    """A field whose values must be allowed; `expected` says in words which are."""
    return field(metadata={"allowed": allowed, "expected": expected}, **options)


def _count(**options: Any) -> Any:
    return _key(lambda value: value >= 1, "a whole number of at least 1", **options)


def _from_zero(**options: Any) -> Any:
    return _key(lambda value: value >= 0, "a number of at least 0", **options)


def _above_zero(**options: Any) -> Any:
    return _key(lambda value: value > 0, "a number above 0", **options)


def _fraction(**options: Any) -> Any:
    return _key(lambda value: 0 <= value < 1, "a number from 0 to below 1", **options)


def _one_of(allowed: Sequence[Any], **options: Any) -> Any:
    return _key(lambda value: value in allowed, f"one of {', '.join(map(str, allowed))}", **options)


@dataclass(frozen=True)
class ModelConfig:
    """The network: the arguments of `fullattn.segmentation.models.FLANet` that a file can name.

    Attributes:
        backbone_weights: file of weights that the backbone starts from, a .pt or .safetensors; null
            for none. Read by `models.backbone.load_weights`.
    """

    backbone: str
    attention: str = "fully"
    attention_options: dict[str, Any] = field(default_factory=dict)
    backbone_options: dict[str, Any] = field(default_factory=dict)
    channels: int = _count(default=512)
    out_channels: int = _count(default=512)
    auxiliary: bool = True
    auxiliary_channels: int = _count(default=64)
    dropout: float = _fraction(default=0.1)
    output_stride: int = _one_of((8, 16, 32), default=8)
    uniform_dilation: bool = True
    pretrained: bool = False
    backbone_weights: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """The data and how they are augmented.

    Attributes:
        name: of the data set: cityscapes, ade20k, voc, camvid or folder.
        train: split to train on, such as train or train+val.
        val: split that is evaluated during training; null for none.
        crop: height and width in pixels.
        pad: whether an image may be smaller than the crop; it is then filled up with ignored
            pixels. Without it such an image is an error before the first step.
        scale: smallest and largest factor of the random resizing.
        flip: probability of a horizontal flip.
        photometric: whether brightness, contrast, saturation and hue are varied.
        mean: of images in 0 to 1, for each colour.
        std: their standard deviation.
        workers: processes that load images, for each training process.
    """

    name: str
    crop: tuple[int, int] = _key(lambda value: min(value) >= 1, "two whole numbers of at least 1")
    train: str = "train"
    val: str | None = "val"
    pad: bool = False
    scale: tuple[float, float] = _key(
        lambda value: 0 < value[0] <= value[1], "two numbers above 0 in order", default=(0.5, 2.0)
    )
    flip: float = _key(lambda value: 0 <= value <= 1, "a number from 0 to 1", default=0.5)
    photometric: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = _key(
        lambda value: min(value) > 0, "three numbers above 0", default=(0.229, 0.224, 0.225)
    )
    workers: int = _from_zero(default=2)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation. A step is one step of the optimizer.

    Attributes:
        steps: of the optimizer in the whole run.
        batch_size: images in a step, over all processes and accumulated parts together.
        accumulate: parts that each process takes its share of a step in, one after the other; the
            result is that of the whole share at once, but for batch normalisation's statistics.
        learning_rate: at the beginning, or after the warm-up where there is one.
        momentum: of SGD.
        weight_decay: of SGD.
        decay_norm_and_bias: whether it also holds for parameters of at most one axis: biases,
            gamma, the weights of normalisations.
        head_learning_rate: factor on the learning rate of everything but the backbone.
        power: of the schedule, learning_rate · (1 - step / steps) ** power.
        warmup_steps: over which the rate first rises in equal steps; 0 for none.
        auxiliary_weight: factor on the loss of each auxiliary head.
        clip_gradient_norm: largest norm of the gradient; null for no clipping.
        average_decay: decay of an exponential moving average of the weights, which is then what is
            evaluated and saved; null for none.
        sync_batchnorm: whether batch normalisation takes its statistics over all processes. Not on
            CPUs.
        precision: 32-true, 64-true, 16-mixed or bf16-mixed.
        strategy: auto, ddp, or fsdp, which shards the parameters.
        seed: of the first weights, the order of the images, augmentation and dropout.
        checkpoint_every: steps between two checkpoints.
        validate_every: steps between two evaluations; null for one at the end.
        log_every: steps between two entries of the logs.
    """

    steps: int = _count()
    batch_size: int = _count()
    learning_rate: float = _above_zero()
    accumulate: int = _count(default=1)
    momentum: float = _fraction(default=0.9)
    weight_decay: float = _from_zero(default=5e-4)
    decay_norm_and_bias: bool = True
    head_learning_rate: float = _above_zero(default=1.0)
    power: float = _from_zero(default=0.9)
    warmup_steps: int = _from_zero(default=0)
    auxiliary_weight: float = _from_zero(default=0.4)
    clip_gradient_norm: float | None = _above_zero(default=None)
    average_decay: float | None = _fraction(default=None)
    sync_batchnorm: bool = False
    precision: str = _one_of(PRECISIONS, default="32-true")
    strategy: str = _one_of(STRATEGIES, default="auto")
    seed: int = _from_zero(default=0)
    checkpoint_every: int = _count(default=500)
    validate_every: int | None = _count(default=None)
    log_every: int = _count(default=50)


@dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
        model: the network.
        data: the images.
        training: the optimisation.
    """

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig

    def plain(self) -> dict[str, dict[str, Any]]:
        """The same as nested dicts of plain values, as in the file."""
        return {
            section: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in entries.items()
            }
            for section, entries in dataclasses.asdict(self).items()
        }

    def text(self) -> str:
        """The same as YAML, which `read` reads again."""
        import yaml

        text: str = yaml.safe_dump(self.plain(), sort_keys=False)
        return text


# What may differ between a checkpoint and the run that continues it.
_FREE = {
    "data.workers",
    "data.val",
    "model.backbone_weights",
    "model.pretrained",
    "training.accumulate",
    "training.checkpoint_every",
    "training.log_every",
    "training.precision",
    "training.strategy",
    "training.sync_batchnorm",
    "training.validate_every",
}


def names() -> list[str]:
    """The names of the configurations that come with the package."""
    folder = resources.files("fullattn.segmentation.training") / "configs"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def read(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        source: name of a shipped one, or path of a YAML file.
        overrides: "section.key=value" each, the value in YAML; they replace what the file says.

    Returns:
        The configuration.

    Raises:
        ConfigError: there is no such configuration, or something in it or in an override does not
            fit; the message names the key and the file.
        ImportError: PyYAML is not installed.

    Example:
        >>> read("camvid_small", ["training.steps=100"]).training.steps
        100
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("configurations are YAML: pip install 'fullattn[train]'") from error

    where = str(source)
    try:
        found = yaml.load(_text(source), _strict_loader())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} is not YAML: {reason}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected sections {_sections()}, got {found!r}")
    origins: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise ConfigError(f"expected --set section.key=value, got {override!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not YAML") from error
        if not isinstance(found.setdefault(section, {}), dict):
            raise ConfigError(f"{where}: expected keys below {section!r}, got {found[section]!r}")
        found[section][key] = value
        origins[name] = f"--set {override}"
    return _config(found, where, origins)


@functools.cache
def _strict_loader() -> Any:
    """YAML's safe loader, for which a key that is there twice is an error."""
    import yaml

    class Strict(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep)
            if len(mapping) < len(node.value):
                keys = [key.value for key, _ in node.value]
                twice = next(key for key in keys if keys.count(key) > 1)
                raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice")
            return mapping

    return Strict


def _text(source: str | Path) -> str:
    if isinstance(source, str) and source in names():
        return (
            resources.files("fullattn.segmentation.training") / "configs" / f"{source}.yaml"
        ).read_text(encoding="utf-8")
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"expected the path of a .yaml file or one of {', '.join(names())}, got {str(source)!r}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read {path}: {reason.lower()}") from error


def _sections() -> str:
    return ", ".join(entry.name for entry in dataclasses.fields(Config))


def _config(found: Mapping[str, Any], where: str, origins: Mapping[str, str]) -> Config:
    classes = typing.get_type_hints(Config)
    for name in found:
        if name not in classes:
            raise ConfigError(f"{where}: unknown section {name!r}{_near(name, classes)}")
    sections = {}
    for name, kind in classes.items():
        entries = found.get(name, {})
        if not isinstance(entries, dict):
            raise ConfigError(f"{where}: expected keys below {name!r}, got {entries!r}")
        sections[name] = _section(kind, name, entries, where, origins)
    return Config(**sections)


Section = TypeVar("Section", ModelConfig, DataConfig, TrainingConfig)


def _section(
    kind: type[Section],
    section: str,
    entries: Mapping[str, Any],
    where: str,
    origins: Mapping[str, str],
) -> Section:
    hints = typing.get_type_hints(kind)
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in entries.items():
        full = f"{section}.{key}"
        origin = origins.get(full, where)
        if key not in known:
            raise ConfigError(f"{origin}: unknown key {full!r}{_near(str(key), known)}")
        values[key] = _value(value, hints[key], known[key], f"{origin}: {full}")
    for key, entry in known.items():
        if key not in values and entry.default is MISSING and entry.default_factory is MISSING:
            raise ConfigError(f"{where}: {section}.{key} is missing")
    return kind(**values)


def _near(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _value(value: Any, hint: Any, entry: Field[Any], name: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    (kind,) = (each for each in kinds if each is not type(None))
    converted = _converted(value, kind)
    allowed = entry.metadata.get("allowed")
    expected = entry.metadata.get("expected") or _words(kind)
    if converted is None or (allowed and not allowed(converted)):
        null = " or null" if type(None) in kinds else ""
        raise ConfigError(f"{name} must be {expected}{null}, got {value!r}")
    return converted


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        return f"a list of {len(inner)} values, each {_words(inner[0])}"
    if typing.get_origin(kind) is dict:
        return "keys and values"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words[kind]


def _converted(value: Any, kind: Any) -> Any:
    """The value as that type, or None where it is not one of it. Nothing is guessed."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            return None
        items = tuple(_converted(item, each) for item, each in zip(value, inner, strict=True))
        return None if None in items else items
    if typing.get_origin(kind) is dict:
        return value if isinstance(value, dict) and all(isinstance(k, str) for k in value) else None
    if kind is float:
        # YAML reads 1e-4 as text, which everyone means as a number.
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number and math.isfinite(value) else None
    if kind is int and isinstance(value, bool):
        return None
    return value if isinstance(value, kind) else None


def differences(before: Mapping[str, Any], now: Config) -> Iterator[tuple[str, Any, Any]]:
    """What differs between a plain configuration and this one in a way that changes the result.

    Args:
        before: as `Config.plain` gives it.
        now: the configuration.

    Yields:
        The key with its section, its value before and its value now.
    """
    for section, entries in now.plain().items():
        old = before.get(section, {})
        for key, value in entries.items():
            if f"{section}.{key}" not in _FREE and old.get(key) != value:
                yield f"{section}.{key}", old.get(key), value
