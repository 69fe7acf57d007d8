"""Teach the FLOP counters of other projects what the layers cost.

A counter that looks at modules or at traced operators misses the products of a fused attention,
and prints a number that is too small. `register_counters` gives each counter that is installed the
formulas of `fullattn.costs`. PyTorch's own FlopCounterMode knows them already.

| counter | unit | what it is taught |
| --- | --- | --- |
| thop, ultralytics-thop | multiply-accumulate | a rule for each layer |
| ptflops | multiply-accumulate | a hook for each layer, and the operators (`backend="aten"`) |
| calflops | FLOPs and multiply-accumulate | a hook for each layer |
| fvcore | multiply-accumulate | PyTorch's fused attention, which its trace holds |
| mmengine | multiply-accumulate | the same |

torchinfo multiplies the sizes of weights alone and cannot be taught.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import warnings
from collections.abc import Callable, Container
from typing import Any

from torch import Tensor

from fullattn.attention import flops
from fullattn.integrations.torchvision import ensure_importable
from fullattn.layers import LAYERS, AttentionLayer

__all__ = ["register_counters"]


def register_counters(only: Container[str] | None = None) -> list[str]:
    """Give every FLOP counter that is installed the formulas of the layers.

    Call it after your own layers are registered, and before counting. Calling it twice is harmless.

    Args:
        only: names of the counters, as this function returns them; None for all.

    Returns:
        Names of the counters that were found.

    Example:
        >>> import fullattn
        >>> taught = fullattn.costs.register_counters()  # such as ["thop", "fvcore"]
    """
    return [
        name
        for name, teach in _COUNTERS.items()
        if (only is None or name in only)
        and importlib.util.find_spec(name) is not None
        and teach() is None
    ]


def _load(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thop reads versions with distutils
        return importlib.import_module(name)


def _flops(layer: AttentionLayer, inputs: tuple[Tensor, ...]) -> int:
    """Count a forward of a layer, from what it is called with."""
    from fullattn import costs

    (x,) = inputs
    shape = (1, *x.shape) if x.dim() == 3 else tuple(x.shape)
    cost = costs.cost(layer, shape, dtype=x.dtype, backend="reference", device=x.device)
    return cost.flops


def _thop() -> None:
    profile = _load("thop.profile")

    def rule(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.total_ops += _flops(layer, inputs) / 2
        # If a layer is profiled alone, what is inside it would be added once more.
        for inner in layer.modules():
            if inner is not layer and hasattr(inner, "total_ops"):
                inner.total_ops *= 0  # a tensor in thop, a number in ultralytics-thop

    profile.register_hooks.update(dict.fromkeys(LAYERS.values(), rule))
    package, count = _load("thop"), profile.profile
    if "stride" in inspect.signature(count).parameters and package.profile is count:

        @functools.wraps(count)
        def exact(model: Any, *args: Any, **kwargs: Any) -> Any:
            # Ultralytics extrapolates from small images, by the area alone.
            if any(isinstance(module, AttentionLayer) for module in model.modules()):
                kwargs.pop("stride", None)
            return count(model, *args, **kwargs)

        package.profile = exact


def _ptflops() -> None:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        layer.__flops__ += _flops(layer, inputs) // 2

    ensure_importable()  # ptflops imports torchvision
    modules = _load("ptflops.pytorch_ops").MODULES_MAPPING
    modules.update(dict.fromkeys(LAYERS.values(), hook))
    operators = _load("ptflops.aten_ops").ATEN_OPS_MAPPING
    for operator, formula in flops.registered().items():

        def of_arguments(inputs: Any, outputs: Any, formula: Callable[..., int] = formula) -> int:
            return formula(*(x.shape if isinstance(x, Tensor) else x for x in inputs)) // 2

        operators[operator] = of_arguments


def _calflops() -> None:
    def hook(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        modules = sum(getattr(inner, "__flops__", 0) for inner in layer.modules())
        attention = _flops(layer, inputs) - modules
        layer.__flops__ += attention
        layer.__macs__ += attention // 2

    mapping = _load("calflops.pytorch_ops").MODULE_HOOK_MAPPING
    mapping.update(dict.fromkeys(LAYERS.values(), hook))


def _of_traced_attention(inputs: list[Any], outputs: list[Any]) -> int:
    shapes = [value.type().sizes() for value in inputs[:3]]
    return int(flops.attend(*shapes)) // 2


def _fvcore() -> None:
    table = _load("fvcore.nn.flop_count")._DEFAULT_SUPPORTED_OPS
    table.setdefault("aten::scaled_dot_product_attention", _of_traced_attention)


def _mmengine() -> None:
    table = _load("mmengine.analysis.complexity_analysis")._DEFAULT_SUPPORTED_FLOP_OPS
    table.setdefault("aten::scaled_dot_product_attention", _of_traced_attention)


_COUNTERS: dict[str, Callable[[], None]] = {
    "thop": _thop,
    "ptflops": _ptflops,
    "calflops": _calflops,
    "fvcore": _fvcore,
    "mmengine": _mmengine,
}
