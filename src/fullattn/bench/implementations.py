"""What is compared: layers on each backend, the official implementation, and users' own modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fullattn import costs
from fullattn._cli.conditions import Conditions
from fullattn._cli.errors import UsageError, describe
from fullattn._cli.loading import layer_named, load_class
from fullattn._cli.shapes import Shape
from fullattn.attention import AttentionInputs, Backend, choose
from fullattn.attention.dispatch import BACKENDS, backend_names, fused
from fullattn.bench.official import OfficialFLANetBlock
from fullattn.layers import LAYERS

__all__ = [
    "BACKEND_CHOICES",
    "OFFICIAL",
    "Contender",
    "build",
    "contenders_at",
    "inputs_of",
]

OFFICIAL = "official"
# Beside names of backends: what "default" and "auto" stand for is said in `_backends_at`.
BACKEND_CHOICES = ("default", "auto", "all")


@dataclass(frozen=True)
class Contender:
    """One row of the table; plain data, so that it can go to a process.

    Attributes:
        layer: a name of a registered layer, `OFFICIAL`, or where to find a user's class:
            "FILE.py:CLASS" or "package.module:CLASS".
        backend: the backend that runs it; None for modules that do not have the choice.
        automatic: whether that is the backend that runs when the user does not choose.
    """

    layer: str
    backend: str | None = None
    automatic: bool = False

    @property
    def name(self) -> str:
        """What the command line and the JSON call it."""
        if self.layer in LAYERS:
            return f"{self.layer}:{self.backend}"
        if self.layer == OFFICIAL:
            return OFFICIAL
        place, _, class_name = self.layer.rpartition(":")
        stem = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
        return f"{stem}:{class_name}"

    @property
    def title(self) -> str:
        """What the table calls it, without its backend."""
        if self.layer == OFFICIAL:
            return "official implementation"
        return LAYERS[self.layer].__name__ if self.layer in LAYERS else self.name

    def answers_to(self, name: str) -> bool:
        """Whether `--baseline name` means this one; a layer's key means its automatic backend."""
        return name == self.name or (self.automatic and name == self.layer)


def inputs_of(layer: str, shape: Shape, dtype: torch.dtype, device: str) -> AttentionInputs:
    """What a layer, built with its defaults, asks of a backend."""
    module = LAYERS[layer](shape.channels, device="meta")
    return costs.inputs_of(module, (*shape,), dtype, device)


def _backends_at(inputs: AttentionInputs, choice: Sequence[str]) -> list[tuple[str, bool]]:
    """Backends of one layer at one shape: (name, whether it is the automatic one).

    "auto" is the automatic choice, "all" is every backend that can run, and "default" the automatic
    one, the first that fuses and the one that builds the map. The two compression layers are run
    fused and built with "auto" as well: a baseline in its slower form would flatter the others.
    """
    try:
        automatic = choose(inputs).name
    except (RuntimeError, ValueError) as error:  # FULLATTN_BACKEND names one that cannot run
        raise UsageError(str(error)) from error

    def able(backends: Iterable[Backend]) -> list[str]:
        return [backend.name for backend in backends if not backend.reasons_against(inputs)]

    names = [automatic] if {"auto", "all", "default"} & set(choice) else []
    if "all" in choice:
        names += able(BACKENDS)
    if "default" in choice or ("auto" in choice and not inputs.sliced):
        names += able(fused(inputs))[:1]
        names += able(backend for backend in BACKENDS if backend.builds_map)[:1]
    names += [name for name in choice if name not in BACKEND_CHOICES]
    return [(name, name == automatic) for name in dict.fromkeys(names)]


def contenders_at(
    shape: Shape,
    conditions: Conditions,
    *,
    layers: Sequence[str],
    backends: Sequence[str],
    users: Sequence[str] = (),
) -> list[Contender]:
    """The contenders at one shape, the official implementation first.

    Args:
        shape: of the feature maps.
        conditions: for their device and dtype.
        layers: names of registered layers.
        backends: names of backends, or of `BACKEND_CHOICES`.
        users: where users' classes are.

    Returns:
        Contenders with distinct names.

    Raises:
        UsageError: a layer or backend has no such name, or two users' classes have one name.
    """
    for layer in layers:
        layer_named(layer)
    for backend in backends:
        if backend not in (*BACKEND_CHOICES, *backend_names()):
            allowed = ", ".join((*BACKEND_CHOICES, *backend_names()))
            raise UsageError(f"expected backends of {allowed}, got {backend!r}")
    dtype, device = getattr(torch, conditions.dtype), torch.device(conditions.device).type
    found = [Contender(OFFICIAL)]
    for layer in dict.fromkeys(layers):
        inputs = inputs_of(layer, shape, dtype, device)
        found += [
            Contender(layer, name, automatic) for name, automatic in _backends_at(inputs, backends)
        ]
    found += [Contender(target) for target in users]
    names = [contender.name for contender in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"expected contenders with distinct names, got {name!r} twice")
    return found


def build(contender: Contender, channels: int, conditions: Conditions) -> nn.Module:
    """Build a contender's module, the same in the timing process and in the memory process.

    Args:
        contender: what to build.
        channels: C.
        conditions: device, dtype, memory format, seed, gamma and projection.

    Returns:
        The module, with seeded parameters.

    Raises:
        UsageError: a user's class is not there, or building it failed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(conditions.seed)
        module = _construct(contender, channels, conditions)
    gamma = getattr(module, "gamma", None)
    if isinstance(gamma, nn.Parameter):
        nn.init.constant_(gamma, conditions.gamma)
    module = module.to(device=conditions.device, dtype=getattr(torch, conditions.dtype))
    if conditions.memory_format == "channels_last":
        # nn.Module.to takes it only by this name; the type stubs do not list it.
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def _construct(contender: Contender, channels: int, conditions: Conditions) -> nn.Module:
    if contender.layer == OFFICIAL:
        return OfficialFLANetBlock(channels, project=conditions.project)
    if contender.layer in LAYERS:
        layer = LAYERS[contender.layer]
        options = {} if conditions.project else layer.head_options
        return layer(channels, **{**options, **layer.bench_options}, backend=contender.backend)
    factory = load_class(contender.layer)
    try:
        module = factory(channels)
    except Exception as error:
        raise UsageError(
            f"contender {contender.layer!r} must be callable with the number of channels, "
            f"got {describe(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"expected contender {contender.layer!r} to build a torch.nn.Module, "
            f"got {type(module).__name__}"
        )
    return module
