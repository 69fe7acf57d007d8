"""Chooses a configuration for a launch, and launches it.

By default Triton's autotuner does, once for each device, dtype, layout, power of two of the
channels and class of the features: batch size and small changes of height and width do not tune
again. Which configuration is fastest may differ from one process to the next, and with it the last
bits of a result. So under `torch.use_deterministic_algorithms(True)` nothing is tuned: the first
configuration that the card can hold runs. So it does in Triton's interpreter, and where nothing was
tuned before a CUDA graph is captured, in which nothing can be timed.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-call,untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor
from triton.runtime import JITFunction
from triton.runtime.errors import OutOfResources

from fullattn.attention.triton import kernels
from fullattn.attention.triton.configurations import (
    AMPERE,
    CONFIGURATIONS,
    HOPPER,
    Configuration,
    candidates,
)
from fullattn.attention.triton.launch import KernelName, Launch

__all__ = ["INTERPRETED", "choices", "run"]

INTERPRETED = not isinstance(kernels.forward, JITFunction)
_KEY = ["CHANNELS", "FEATURES", "LAYOUT", "PRECISION"]


def _bench(call: Callable[[], object], quantiles: tuple[float, ...]) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=25, quantiles=quantiles)


def _as_triton(entry: Configuration) -> triton.Config:
    return triton.Config(entry.constants, num_warps=entry.warps, num_stages=entry.stages)


def _allowed(kernel: KernelName, arguments: dict[str, Any]) -> list[Configuration]:
    x: Tensor = arguments["x"]
    hopper = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] >= 9
    return candidates(
        kernel,
        features=arguments["FEATURES"],
        channels=arguments["CHANNELS"],
        number_bytes=x.element_size(),
        precision=arguments["PRECISION"],
        generation=HOPPER if hopper else AMPERE,
    )


@functools.cache
def _tuner(kernel: KernelName, device: torch.device) -> Any:
    """Triton's autotuner; one for each device, because its own key does not know them apart."""

    def prune(configs: list[Any], named: dict[str, Any], **arguments: Any) -> list[Any]:
        return [_as_triton(entry) for entry in _allowed(kernel, named | arguments)]

    return triton.autotune(
        configs=[_as_triton(entry) for entry in CONFIGURATIONS.values()],
        key=_KEY,
        prune_configs_by={"early_config_prune": prune},
        restore_value=["out"],  # most launches add to it
        do_bench=_bench,
    )(getattr(kernels, kernel))


_tuned: dict[tuple[Any, ...], Configuration] = {}


def _may_tune() -> bool:
    return not (INTERPRETED or torch.cuda.is_current_stream_capturing())


def run(launch: Launch) -> None:
    """Launch a kernel in the configuration that was found fastest, or in the first that fits.

    Args:
        launch: what to launch.

    Raises:
        TritonError: the kernel does not compile, or no configuration fits the card.
    """
    arguments = launch.arguments | launch.constants
    if launch.kernel == "copy":
        kernels.copy[(launch.programs(1),)](**arguments)
        return
    x, out = arguments["x"], arguments["out"]
    key = (launch.kernel, x.device, x.dtype, out.dtype, *(arguments[name] for name in _KEY))

    def grid(constants: dict[str, Any]) -> tuple[int]:
        return (launch.programs(constants["OWN"]),)

    if torch.are_deterministic_algorithms_enabled():
        allowed = _allowed(launch.kernel, arguments)
    elif key in _tuned:
        allowed = [_tuned[key]]
    elif _may_tune():
        tuner = _tuner(launch.kernel, x.device)
        tuner[grid](**arguments)
        _tuned[key] = next(
            entry
            for entry in CONFIGURATIONS.values()
            if str(_as_triton(entry)) == str(tuner.best_config)
        )
        return
    else:
        allowed = _allowed(launch.kernel, arguments)
    for entry in allowed:
        try:
            getattr(kernels, launch.kernel)[grid](**arguments, **entry.constants, **entry.options)
            return
        except OutOfResources:
            if entry is allowed[-1]:
                raise


def choices() -> list[tuple[str, str]]:
    """What was tuned so far: (kernel and what for, name of the configuration)."""
    return [(" ".join(map(str, key)), entry.name) for key, entry in _tuned.items()]
