"""Settings of a training run, read from YAML and checked before anything else is done.

A configuration has three sections: model, data and training. The keys of a section are the fields
of its model below, and a field without a default is required. Types are strict: the text "3" is not
the integer 3, but an integer is accepted as a float.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from fullattn._text import did_you_mean, installing

try:
    import yaml
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        NonNegativeInt,
        PositiveInt,
        ValidationError,
    )
except ImportError as _error:
    raise ImportError(
        f"configurations need PyYAML and pydantic: {installing('train')} ({_error})"
    ) from _error

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


class ConfigError(ValueError):
    """An invalid configuration; the message names the file or the option, and the key."""


def _number(value: Any) -> Any:
    """Convert text such as 1e-4, which YAML 1.1 does not read as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("should be in ascending order")
    return values


_Number = Annotated[float, BeforeValidator(_number)]
_Positive = Annotated[_Number, Field(gt=0)]
_NonNegative = Annotated[_Number, Field(ge=0)]
_Fraction = Annotated[_Number, Field(ge=0, lt=1)]
_FROM_LIST = Field(strict=False)  # a tuple; its items stay strict


class _Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )


class ModelConfig(_Strict):
    """The network: arguments of `fullattn.segmentation.models.FLANet`.

    Attributes:
        pretrained: whether the backbone starts from timm's weights.
        backbone_weights: file of weights that the backbone starts from, .pt or .safetensors; null
            for none. Read by `models.backbone.load_weights`.
    """

    backbone: str
    attention: str = "fully"
    attention_options: dict[str, Any] = Field(default_factory=dict)
    backbone_options: dict[str, Any] = Field(default_factory=dict)
    channels: PositiveInt = 512
    out_channels: PositiveInt = 512
    auxiliary: bool = True
    auxiliary_channels: PositiveInt = 64
    dropout: _Fraction = 0.1
    output_stride: Literal[8, 16, 32] = 8
    uniform_dilation: bool = True
    pretrained: bool = False
    backbone_weights: str | None = None


class DataConfig(_Strict):
    """The dataset and its augmentation.

    Attributes:
        name: cityscapes, ade20k, voc, camvid or folder.
        crop: height and width in pixels.
        train: split to train on, such as train or train+val.
        val: split to evaluate during training; null for none.
        pad: whether images smaller than the crop are padded with ignored pixels. Without it such an
            image is an error before the first step.
        scale: smallest and largest factor of the random resizing.
        flip: probability of a horizontal flip.
        photometric: whether brightness, contrast, saturation and hue are varied.
        mean: mean of each colour, of images in 0 to 1.
        std: standard deviation of each colour.
        workers: number of processes that load images, for each training process.
    """

    name: str
    crop: Annotated[tuple[PositiveInt, PositiveInt], _FROM_LIST]
    train: str = "train"
    val: str | None = "val"
    pad: bool = False
    scale: Annotated[tuple[_Positive, _Positive], _FROM_LIST, AfterValidator(_ascending)] = (0.5, 2)
    flip: Annotated[_Number, Field(ge=0, le=1)] = 0.5
    photometric: bool = True
    mean: Annotated[tuple[_Number, _Number, _Number], _FROM_LIST] = (0.485, 0.456, 0.406)
    std: Annotated[tuple[_Positive, _Positive, _Positive], _FROM_LIST] = (0.229, 0.224, 0.225)
    workers: NonNegativeInt = 2


class TrainingConfig(_Strict):
    """The optimisation. A step is one step of the optimizer.

    Attributes:
        steps: number of steps of the whole run.
        batch_size: images in a step, over all processes and accumulation steps.
        learning_rate: at the beginning, or after the warm-up.
        accumulate: number of forward and backward passes in which each process computes a step. The
            result equals that of a single pass, except for the statistics of batch normalisation.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        decay_norm_and_bias: whether weight decay applies to parameters of at most one axis: biases,
            gamma and the weights of normalisations.
        head_learning_rate: factor on the learning rate of everything but the backbone.
        power: power of the schedule, learning_rate · (1 - step / steps) ** power.
        warmup_steps: steps of the linear warm-up of the learning rate; 0 for none.
        auxiliary_weight: factor on the loss of each auxiliary head.
        clip_gradient_norm: largest norm of the gradient; null for no clipping.
        average_decay: decay of an exponential moving average of the weights, which is then
            evaluated and saved; null for none.
        sync_batchnorm: whether batch normalisation takes its statistics over all processes. GPUs
            only.
        precision: Lightning's precision.
        strategy: Lightning's strategy; fsdp shards the parameters.
        seed: seed of the initial weights, the order of the images, augmentation and dropout.
        checkpoint_every: steps between two checkpoints.
        validate_every: steps between two evaluations; null for one at the end.
        log_every: steps between two entries of the logs.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: _Positive
    accumulate: PositiveInt = 1
    momentum: _Fraction = 0.9
    weight_decay: _NonNegative = 5e-4
    decay_norm_and_bias: bool = True
    head_learning_rate: _Positive = 1.0
    power: _NonNegative = 0.9
    warmup_steps: NonNegativeInt = 0
    auxiliary_weight: _NonNegative = 0.4
    clip_gradient_norm: _Positive | None = None
    average_decay: _Fraction | None = None
    sync_batchnorm: bool = False
    precision: Literal["32-true", "64-true", "16-mixed", "bf16-mixed"] = "32-true"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    checkpoint_every: PositiveInt = 500
    validate_every: PositiveInt | None = None
    log_every: PositiveInt = 50


class Config(_Strict):
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
        """Convert to nested dicts of plain values, as in the file."""
        return self.model_dump(mode="json")

    def text(self) -> str:
        """Convert to YAML, which `read` accepts."""
        text: str = yaml.safe_dump(self.plain(), sort_keys=False)
        return text


# Keys that may differ between a checkpoint and the run that continues it.
_RESUMABLE_CHANGES = {
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
_SHIPPED = resources.files("fullattn.segmentation.training") / "configs"


def names() -> list[str]:
    """List the configurations that come with the package."""
    files = (entry.name for entry in _SHIPPED.iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def read(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        source: name of a configuration that comes with the package, or path of a YAML file.
        overrides: "section.key=value" each, the value in YAML; they replace values of the file.

    Returns:
        The configuration.

    Raises:
        ConfigError: the configuration does not exist, or a key or value in it or in an override is
            invalid; the message names the key and the file.

    Example:
        >>> read("camvid_small", ["training.steps=100"]).training.steps
        100
    """
    settings = _parse(_text(source), str(source))
    if not isinstance(settings, dict):
        sections = ", ".join(Config.model_fields)
        raise ConfigError(f"{source}: expected sections {sections}, got {settings!r}")
    origins: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise ConfigError(f"expected --set section.key=value, got {override!r}")
        origins[name] = f"--set {override}"
        if section not in settings:
            origins[section], settings[section] = origins[name], {}
        if isinstance(settings[section], dict):  # otherwise the validation below fails
            settings[section][key] = _parse(text, origins[name])
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        # Report unknown keys first: a misspelt key is also a missing one.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        keys = [str(key) for key in first["loc"]]
        origin = origins.get(".".join(keys[:2]), source)
        raise ConfigError(f"{origin}: {_problem(keys, first)}") from error


def _text(source: str | Path) -> str:
    if source in names():
        return (_SHIPPED / f"{source}.yaml").read_text(encoding="utf-8")
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


class _UniqueKeyLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader that rejects duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        keys = [key.value for key, _ in node.value]
        if duplicate := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {duplicate!r}")
        return mapping


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: invalid YAML: {' '.join(str(error).split())}") from error


def _problem(keys: Sequence[str], error: Mapping[str, Any]) -> str:
    """Describe one of pydantic's errors."""
    name = ".".join(keys)
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "extra_forbidden":
        model = Config.model_fields[keys[0]].annotation if len(keys) > 1 else Config
        known = list(model.model_fields)  # type: ignore[union-attr]
        prefix = name.removesuffix(keys[-1])
        hint = did_you_mean(keys[-1], known, prefix) or f"; expected one of {', '.join(known)}"
        return f"unknown key {name!r}{hint}"
    expected = re.sub("^(Input|Tuple|Value error,) ", "", error["msg"])
    return f"{name} {expected}, got {error['input']!r}"


def differences(before: Mapping[str, Any], config: Config) -> Iterator[tuple[str, Any, Any]]:
    """Find the settings that changed in a way that changes the result of the training.

    Args:
        before: an earlier configuration, from `Config.plain`.
        config: the present configuration.

    Yields:
        The key with its section, its earlier and its present value.
    """
    for section, entries in config.plain().items():
        old = before.get(section, {})
        for key, value in entries.items():
            if f"{section}.{key}" not in _RESUMABLE_CHANGES and old.get(key) != value:
                yield f"{section}.{key}", old.get(key), value
