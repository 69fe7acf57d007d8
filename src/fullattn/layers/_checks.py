"""Checks of shapes, dtypes and options, shared by the layers."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fullattn.attention import is_autocast_enabled
from fullattn.attention.tracing import is_jit_traced, is_transformed, plain_shape
from fullattn.layers import _hints

T = TypeVar("T")


_signature = lru_cache(maxsize=64)(inspect.signature)  # inspecting takes 0.2 ms


def arguments(layer: type[nn.Module], args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raise a TypeError with a hint if a layer has no such keyword or takes fewer arguments."""
    signature = _signature(layer.__init__)
    try:
        signature.bind_partial(None, *args, **options)
    except TypeError:
        _, *parameters = signature.parameters.values()
        names = [parameter.name for parameter in parameters]
        positional = [
            parameter.name
            for parameter in parameters
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        for name in options:
            if name not in names:
                free = [each for each in names[len(args) :] if each not in options]
                raise TypeError(
                    f"{layer.__name__} got an unexpected keyword argument {name!r}"
                    f"{_hints.of_keyword(name, free)}"
                ) from None
        if len(args) > len(positional):
            plural = "s" if len(positional) > 1 else ""
            raise TypeError(
                f"{layer.__name__} takes {len(positional)} positional argument{plural}, "
                f"{', '.join(positional)}, got ({', '.join(map(_hints.shown, args))}); height and "
                "width are free, and options are keywords"
            ) from None
        raise


def positive(value: object, name: str) -> int:
    """Return value if it is a positive integer, or raise naming the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a positive integer, got {_hints.shown(value)}")
    if value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value}")
    return int(value)


def number(value: object, name: str) -> float:
    """Return value as a float if it is a finite real number, or raise naming the argument."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_hints.shown(value)}")
    if not float("-inf") < float(value) < float("inf"):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def scale(value: object) -> float | None:
    """Return a scale, which is a number or None for 1/√d, or raise."""
    return None if value is None else number(value, "scale")


def option(value: T, name: str, allowed: tuple[T, ...]) -> T:
    """Return value if it is allowed, or raise listing the allowed values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def module_factory(
    value: Callable[..., nn.Module] | None, name: str
) -> Callable[..., nn.Module] | None:
    """Return a module class or callable, or None, or raise naming the argument."""
    if value is not None and (not callable(value) or isinstance(value, nn.Module)):
        raise TypeError(
            f"{name} must be a module class, a callable or None, got {_hints.shown(value)}"
        )
    return value


def normalisation(
    factory: Callable[..., nn.Module],
    channels: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Build a normalisation, and move it if a device or dtype was asked for."""
    module = factory(channels)
    return module if device is None and dtype is None else module.to(device=device, dtype=dtype)


def feature_map(x: Tensor, channels: int, parameter: Tensor | None) -> tuple[Tensor, bool]:
    """Check the input of a layer with a number of channels, and add a missing batch axis.

    Device and dtype are those of `parameter`, one of the layer's own; None if it has none.

    Returns:
        x as (B, C, H, W), and whether the batch axis was added.

    Raises:
        TypeError: not a tensor, not real floating point, or a dtype other than the parameters'.
        ValueError: a wrong rank, number of channels or device, or a size of 0.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"expected a tensor of shape (B, {channels}, H, W), got {type(x).__name__}"
            f"{_hints.of_type(x)}"
        )
    shape = plain_shape(x)
    if len(shape) not in (3, 4):
        raise ValueError(
            f"expected an input of shape (B, {channels}, H, W) or ({channels}, H, W), "
            f"got {x.dim()} axes: {tuple(shape)}{_hints.of_shape(shape, channels)}"
        )
    if shape[-3] != channels:
        raise ValueError(
            f"expected {channels} channels in axis {x.dim() - 3}, got {shape[-3]}: "
            f"shape {tuple(shape)}{_hints.of_shape(shape, channels)}"
        )
    if shape[-2] == 0 or shape[-1] == 0:
        raise ValueError(f"expected H and W of at least 1, got shape {tuple(shape)}")
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"expected a real floating-point dtype, got {x.dtype}{_hints.of_dtype(x.dtype)}"
        )
    if parameter is not None:
        if x.device != parameter.device:
            raise ValueError(
                f"expected an input on the layer's device {parameter.device}, got {x.device}"
            )
        # The weights of a quantised module may be integers, which say nothing of its inputs.
        comparable = parameter.dtype.is_floating_point
        if x.dtype != parameter.dtype and comparable and not is_autocast_enabled(x.device.type):
            raise TypeError(
                f"expected the layer's dtype {parameter.dtype}, got {x.dtype}; use "
                f"x.to({parameter.dtype}), layer.to({x.dtype}) or torch.autocast"
            )
    return (x.unsqueeze(0), True) if x.dim() == 3 else (x, False)


def like_input(y: Tensor, x: Tensor, unbatched: bool) -> Tensor:
    """Return y in the memory format of x, both (B, C, H, W), without B if x came without."""
    if is_jit_traced() or is_transformed():  # maps of another format, or formats that are hidden
        pass
    elif x.is_contiguous():
        y = y.contiguous()
    elif x.is_contiguous(memory_format=torch.channels_last):
        y = y.contiguous(memory_format=torch.channels_last)
    return y.squeeze(0) if unbatched else y
