"""The base class of the layers, and the registry of layers.

An `AttentionLayer` declares its name, operation and paper, and defines how queries, keys and values
are made (`attention`), what follows the attention (`finish`) and the sizes of both (`work`).
Similarity maps, costs, figures, benchmarks, FLANet's `attention=`, the integrations and the
documentation's cost explorer are derived from that, through `LAYERS`.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, fx, nn

from fullattn import attention
from fullattn.attention import AttentionCall, BranchSizes, Operation
from fullattn.attention.sizes import Size
from fullattn.layers import _checks

__all__ = ["LAYERS", "AttentionLayer", "Convolutions", "Work", "register", "unregister"]


@dataclass(frozen=True)
class Convolutions:
    """Costs of the modules that follow the attention, in bytes except for `flops`.

    Attributes:
        flops: of a forward pass.
        weights: of their parameters.
        workspace: of the first module in forward, besides its input and result.
        backward_workspace: the same in backward.
        later: number of modules after the first, each with a result of the same size.
        normalised: whether a normalisation among them saves its input for backward.
    """

    flops: Size
    weights: Size
    workspace: Size = 0
    backward_workspace: Size = 0
    later: int = 0
    normalised: bool = False


@dataclass(frozen=True)
class Work:
    """Sizes of a layer's computation on a batch of feature maps; integers or symbols.

    Attributes:
        branches: sizes of each attention, in the order in which they run.
        flops: forward FLOPs of the modules before the attention.
        parameters: elements of all parameters.
        inputs: bytes of queries, keys and values other than x itself.
        kept: bytes that the modules before the attention save for backward.
        making: peak bytes while queries, keys and values are made.
        gradients: bytes of gradients at the end of backward: of the attention's inputs, of x and of
            the parameters.
        branch_gradient: bytes of the gradient of x that each branch adds until then.
        output: modules of a layer x + output(attended); None for gamma · attended + x.
        output_inputs: bytes of the gradient of the attended values, with `output`.
        projection: modules after the residual; None for none.
    """

    branches: tuple[BranchSizes, ...]
    flops: Size
    parameters: Size
    inputs: Size
    kept: Size
    gradients: Size
    making: Size = 0
    branch_gradient: Size = 0
    output: Convolutions | None = None
    output_inputs: Size = 0
    projection: Convolutions | None = None


class AttentionLayer(nn.Module):
    """Base class of the layers, also of your own.

    A subclass sets `layer_name`, `paper` and `operation`, takes `channels` and the keywords `scale`
    and `backend`, defines `attention` and `work`, and is registered with `register`.

    Attributes:
        layer_name: name on the command line and in `FLANet(attention=...)`.
        paper: source of the layer.
        operation: the operation that `attention` returns, with the cuts of its feature maps.
        head_options: options inside a network with a projection of its own; with them the layer
            starts as the identity.
        bench_options: options in benchmarks, for layers whose result is 0 or x by default.
        channels: C.
        scale: factor on the scores; None for 1/√d.
        backend: name of the attention backend; None for the automatic choice.
        gamma: factor of the attention; None or missing for the attended values alone.
    """

    layer_name: ClassVar[str]
    paper: ClassVar[str]
    operation: ClassVar[Operation]
    head_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    bench_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    channels: int
    scale: float | None = 1.0
    backend: str | None = None
    gamma: nn.Parameter | None

    if not TYPE_CHECKING:  # the arguments are those of __init__

        def __new__(cls, *args, **options):
            """Refuse arguments that the layer does not take, with a hint."""
            _checks.arguments(cls, args, options)
            return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if "transformers.modeling_utils" in sys.modules:
            # Its networks initialise parameters by classes that they know, ours not among them.
            import_module("fullattn.integrations.transformers").register()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionLayer:
        twin: AttentionLayer = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:  # unpickled, not copied
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "ultralytics.nn.tasks" in sys.modules:
            # Otherwise resuming would build the network of a checkpoint without its layers.
            import_module("fullattn.integrations.ultralytics").register()

    def attention(self, x: Tensor) -> AttentionCall:
        """Compute queries, keys and values with the layer's own modules.

        Args:
            x: feature map, (B, C, H, W).

        Returns:
            The operation and its tensors.
        """
        raise NotImplementedError

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Apply what follows the attention and its residual.

        Args:
            x: feature map, (B, C, H, W).
            y: gamma · attended + x, or the attended values where gamma is None.

        Returns:
            The layer's result, (B, C, H, W).
        """
        return y

    def work(self, shape: tuple[Size, Size, Size, Size], size: Size) -> Work:
        """Return the sizes of the layer's computation, for its costs.

        Args:
            shape: (B, C, H, W), of integers or symbols; C may differ from the layer's own.
            size: bytes of an element.

        Returns:
            The sizes.

        Raises:
            ValueError: this form of the layer has no formula.
        """
        raise NotImplementedError

    @classmethod
    def untrained(cls, channels: int, scale: float) -> AttentionLayer:
        """Build a layer that compares features without a learned map, to plot similarity maps."""
        return cls(channels, scale=scale, **cls.head_options)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: feature map, (B, C, H, W) or (C, H, W).

        Returns:
            A tensor of x's shape and memory format; a traced program leaves the format open.
        """
        if isinstance(x, fx.Proxy):
            return _one_call(self, x)
        x, unbatched = self.check(x)
        gamma = getattr(self, "gamma", None)
        y, added = attention.run(self.attention(x), x, gamma, backend=self.backend)
        if not added:
            y = attention.scaled_residual(x, gamma, y)
        return _checks.like_input(self.finish(x, y), x, unbatched)

    def __prepare_scriptable__(self) -> AttentionLayer:
        """Refuse torch.jit.script, which calls this method first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: use torch.jit.trace, whose "
            "program takes any batch, height and width, or torch.export, or torch.compile"
        )

    def similarity(self, x: Tensor) -> Any:
        """Build the similarity maps that `forward` multiplies with the values.

        Args:
            x: feature map, (B, C, H, W) or (C, H, W).

        Returns:
            A tensor, or a named tuple with one for each branch; without B for an unbatched input.
        """
        x, unbatched = self.check(x)
        maps = attention.maps(self.attention(x))
        if not unbatched:
            return maps
        if isinstance(maps, Tensor):
            return maps.squeeze(0)
        return type(maps)(*(each.squeeze(0) for each in maps))

    def check(self, x: Tensor) -> tuple[Tensor, bool]:
        """Check an input and add a missing batch axis.

        Args:
            x: the input.

        Returns:
            (B, C, H, W), and whether the batch axis was added.

        Raises:
            TypeError: not a tensor, or a dtype other than the parameters'.
            ValueError: a wrong rank, number of channels or device, or a size of 0.
        """
        return _checks.feature_map(x, self.channels, getattr(self, "gamma", None))

    def check_size(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if a feature map (B, C, H, W) is too small for the layer."""

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    def option(self, name: str) -> Any:
        """Return the value of an option for `extra_repr`; None if it is the default of None."""
        return getattr(self, name)

    def extra_repr(self) -> str:
        """List the options that differ from the paper's."""
        shown = [f"{self.channels}"]
        # A subclass of a layer may have other options; `layer` is the class next to the base class.
        own = [each for each in type(self).__mro__ if issubclass(each, AttentionLayer)]
        layer = own[-2] if len(own) > 1 else own[0]
        for name, parameter in inspect.signature(layer).parameters.items():
            if parameter.default is not parameter.empty and hasattr(self, name):
                value = self.option(name)
                if isinstance(parameter.default, bool) and not isinstance(value, bool):
                    value = value is not None  # a module, there or not
                if value != parameter.default:
                    shown.append(f"{name}={value!r}")
        return ", ".join(shown)


def _one_call(layer: AttentionLayer, x: fx.Proxy) -> Any:
    """Record a layer in an fx graph as one call of the module."""
    tracer = x.tracer
    try:
        name = tracer.path_of_module(layer)  # type: ignore[attr-defined]
    except NameError:
        name = ""
    if not name:  # the layer itself is traced: put it into a module that can call it
        name = "layer"
        tracer.root = nn.ModuleDict({name: layer})  # type: ignore[attr-defined]
    return tracer.create_proxy("call_module", name, (x,), {})


LAYERS: dict[str, type[AttentionLayer]] = {}
_Layer = TypeVar("_Layer", bound=type[AttentionLayer])


def register(layer: _Layer) -> _Layer:
    """Register a layer under its `layer_name`; also a class decorator.

    Args:
        layer: a subclass of `AttentionLayer`.

    Returns:
        The layer.

    Raises:
        TypeError: a part of the protocol is missing; the message names it.
        ValueError: another layer has the name.
    """
    if not (isinstance(layer, type) and issubclass(layer, AttentionLayer)):
        raise TypeError(f"expected a subclass of AttentionLayer, got {layer!r}")
    missing = list(_missing(layer))
    if missing:
        raise TypeError(f"cannot register {layer.__name__}: it lacks {'; '.join(missing)}")
    other = LAYERS.get(layer.layer_name, layer)
    if other is not layer:
        raise ValueError(
            f"cannot register {layer.__name__}: {other.__name__} has the name {layer.layer_name!r}"
        )
    LAYERS[layer.layer_name] = layer
    return layer


def unregister(layer: type[AttentionLayer]) -> None:
    """Remove a layer from the registry."""
    del LAYERS[layer.layer_name]


def _missing(layer: type[AttentionLayer]) -> Iterable[str]:
    name = getattr(layer, "layer_name", None)
    if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name)):
        yield f"a `layer_name` of lower-case letters, digits and underscores (got {name!r})"
    if not (isinstance(getattr(layer, "paper", None), str) and layer.paper):
        yield "a `paper`"
    if not isinstance(getattr(layer, "operation", None), Operation):
        yield "an `operation`"
    for method in ("attention", "work"):
        if getattr(layer, method) is getattr(AttentionLayer, method):
            yield f"the method `{method}`"
    parameters = inspect.signature(layer).parameters
    if next(iter(parameters), None) != "channels":
        yield "`channels` as first argument"
    for option in ("scale", "backend"):
        parameter = parameters.get(option)
        if parameter is None or parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            yield f"the keyword `{option}`"
    for options in ("head_options", "bench_options"):
        unknown = set(getattr(layer, options)) - set(parameters)
        if unknown:
            yield f"the options {', '.join(map(repr, sorted(unknown)))} of `{options}`"
