"""What is compared: layers on each backend, the official implementation, and the user's modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fullattn import costs
from fullattn._cli.conditions import MEMORY_FORMATS, Conditions
from fullattn._cli.errors import UsageError, describe
from fullattn._cli.loading import layer_named, load_class
from fullattn._cli.shapes import Shape
from fullattn.attention import AttentionInputs, Backend, BackendError, choose
from fullattn.attention.dispatch import BACKENDS, backend_names, fused
from fullattn.bench.official import OfficialFLANetBlock
from fullattn.layers import LAYERS, FullyAttentional

__all__ = [
    "BACKEND_CHOICES",
    "OFFICIAL",
    "Formula",
    "Implementation",
    "implementations_at",
    "inputs_of",
]

OFFICIAL = "official"
# Accepted beside names of backends; see `_backends_at`.
BACKEND_CHOICES = ("default", "auto", "all")


@dataclass(frozen=True)
class Formula:
    """The costs of an implementation that need no measurement; None where there is no formula.

    Attributes:
        parameters: elements of the module's parameters.
        flops: 2 × multiply-accumulate of one forward, by `fullattn.costs`.
        counted_flops: the same by PyTorch's FlopCounterMode; 0 where it has no formula.
        map_numel: elements of all similarity maps of the batch.
        map_bytes: their size, whether or not the backend builds them.
        inference_bytes: peak over the inputs of a forward, by formula.
        training_bytes: the same of forward and backward.
    """

    parameters: int | None = None
    flops: int | None = None
    counted_flops: int | None = None
    map_numel: int | None = None
    map_bytes: int | None = None
    inference_bytes: int | None = None
    training_bytes: int | None = None


@dataclass(frozen=True)
class Implementation:
    """A row of the table: plain data from which any process builds the same module.

    Attributes:
        layer: a name of a registered layer, `OFFICIAL`, or where to find the user's class:
            "FILE.py:CLASS" or "package.module:CLASS".
        backend: the backend that runs it; None for modules without backends.
        automatic: whether that backend runs when the user does not choose one.
    """

    layer: str
    backend: str | None = None
    automatic: bool = False

    @property
    def name(self) -> str:
        """Name on the command line and in the JSON."""
        if self.layer in LAYERS:
            return f"{self.layer}:{self.backend}"
        if self.layer == OFFICIAL:
            return OFFICIAL
        place, _, class_name = self.layer.rpartition(":")
        stem = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
        return f"{stem}:{class_name}"

    @property
    def title(self) -> str:
        """Name in the tables, without the backend."""
        if self.layer == OFFICIAL:
            return "official implementation"
        return LAYERS[self.layer].__name__ if self.layer in LAYERS else self.name

    def matches(self, name: str) -> bool:
        """Whether `--baseline name` means this; a layer's name means its automatic backend."""
        return name == self.name or (self.automatic and name == self.layer)

    def build(self, channels: int, conditions: Conditions) -> nn.Module:
        """Build the module with seeded parameters.

        Args:
            channels: C.
            conditions: device, dtype, memory format, seed, gamma and projection.

        Raises:
            UsageError: the user's class is not found, or building it failed.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(conditions.seed)
            module = self._construct(channels, conditions)
        gamma = getattr(module, "gamma", None)
        if isinstance(gamma, nn.Parameter):
            nn.init.constant_(gamma, conditions.gamma)
        return conditions.placed(module)

    def _construct(self, channels: int, conditions: Conditions) -> nn.Module:
        if self.layer == OFFICIAL:
            return OfficialFLANetBlock(channels, project=conditions.project)
        if self.layer in LAYERS:
            layer = LAYERS[self.layer]
            options = {} if conditions.project else layer.head_options
            return layer(channels, **{**options, **layer.bench_options}, backend=self.backend)
        factory = load_class(self.layer)
        try:
            module = factory(channels)
        except Exception as error:
            raise UsageError(
                f"module {self.layer!r} must be callable with the number of channels, "
                f"got {describe(error)}"
            ) from error
        if not isinstance(module, nn.Module):
            raise UsageError(
                f"expected {self.layer!r} to build a torch.nn.Module, got {type(module).__name__}"
            )
        return module

    def formula(self, module: nn.Module, shape: Shape, conditions: Conditions) -> Formula:
        """Compute what can be known of a module without running it."""
        parameters = sum(parameter.numel() for parameter in module.parameters())
        found = Formula(parameters, counted_flops=_counted_flops(module, shape, conditions))
        backend = self.backend
        if self.layer == OFFICIAL:  # the same sums; what it keeps in memory has no formula
            module, backend = FullyAttentional(shape.channels, project=conditions.project), None
        elif self.layer not in LAYERS:
            return found
        try:
            cost = costs.cost(
                module,
                shape,
                dtype=conditions.torch_dtype,
                backend=backend or "reference",
                device=conditions.device_type,
            )
        except BackendError:
            return found
        found = replace(found, flops=cost.flops, map_numel=cost.map_numel, map_bytes=cost.map_bytes)
        if backend is None:
            return found
        return replace(
            found, inference_bytes=cost.inference_bytes, training_bytes=cost.training_bytes
        )


def _counted_flops(module: nn.Module, shape: Shape, conditions: Conditions) -> int | None:
    """Count one forward on tensors without data; None if the module reads its data."""
    module.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            x = torch.empty(
                shape,
                dtype=conditions.torch_dtype,
                device=conditions.device,
                memory_format=MEMORY_FORMATS[conditions.memory_format],
            )
            return costs.counted_flops(lambda: module(x))
    except Exception:
        return None


def inputs_of(layer: str, shape: Shape, conditions: Conditions) -> AttentionInputs:
    """Describe what a layer passes to its backend."""
    module = LAYERS[layer](shape.channels, device="meta")
    return costs.inputs_of(module, (*shape,), conditions.torch_dtype, conditions.device_type)


def _backends_at(inputs: AttentionInputs, choice: Sequence[str]) -> list[tuple[str, bool]]:
    """List the backends of one layer at one shape: (name, whether it is the automatic one).

    "auto" is the automatic choice, "all" is every backend that can run, and "default" the automatic
    one, the first that fuses and the one that builds the map. The two compression layers are run
    fused and built with "auto" as well: their slower variant alone would be an unfair baseline.
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


def implementations_at(
    shape: Shape,
    conditions: Conditions,
    *,
    layers: Sequence[str],
    backends: Sequence[str],
    modules: Sequence[str] = (),
) -> list[Implementation]:
    """List the implementations to compare at one shape, the official one first.

    Args:
        shape: of the feature maps.
        conditions: for their device and dtype.
        layers: names of registered layers.
        backends: names of backends, or of `BACKEND_CHOICES`.
        modules: where the user's classes are.

    Returns:
        Implementations with distinct names.

    Raises:
        UsageError: no layer or backend has such a name, or two modules have one name.
    """
    allowed = (*BACKEND_CHOICES, *backend_names())
    for backend in backends:
        if backend not in allowed:
            raise UsageError(f"expected backends of {', '.join(allowed)}, got {backend!r}")
    found = [Implementation(OFFICIAL)]
    for layer in dict.fromkeys(map(layer_named, layers)):
        chosen = _backends_at(inputs_of(layer, shape, conditions), backends)
        found += [Implementation(layer, name, automatic) for name, automatic in chosen]
    found += [Implementation(target) for target in modules]
    names = [implementation.name for implementation in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"expected implementations with distinct names, got {name!r} twice")
    return found
