"""A module with its input, ready to be called."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fullattn._cli.conditions import Conditions, Mode
from fullattn._cli.inputs import feature_map, random_like
from fullattn._cli.shapes import Shape
from fullattn.bench.implementations import Implementation

__all__ = ["LayerRecipe", "Recipe", "ShapeError", "Workload"]


class ShapeError(RuntimeError):
    """A module returned something other than a tensor of its input's shape."""


class Workload:
    """A module and its input.

    Args:
        module: what is measured.
        x: the input, (B, C, H, W).
        grad: the gradient of the output in training; None where only inference is measured.
    """

    corner = 16  # height and width of the smaller input to warm up with

    def __init__(self, module: nn.Module, x: Tensor, grad: Tensor | None) -> None:
        self.module: nn.Module = module
        self.x: Tensor = x
        self.grad: Tensor | None = grad

    def warm_up_small(self, mode: Mode) -> None:
        """Call the module once on a corner of the input; one made for large maps alone may fail."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach()[..., : self.corner, : self.corner].clone()

        small = type(self)(self.module, cut(self.x), None if self.grad is None else cut(self.grad))
        small.prepare(mode)
        with suppress(Exception):
            small.run(mode)
        small.module.zero_grad(set_to_none=True)

    def prepare(self, mode: Mode) -> None:
        """Drop the last call's gradients and set the mode; not part of what is measured."""
        self.module.train(mode == "training")
        self.module.zero_grad(set_to_none=True)
        self.x.grad = None
        self.x.requires_grad_(mode == "training")

    def run(self, mode: Mode) -> None:
        """Call the module once: forward, and in training backward to input and parameters.

        Raises:
            ShapeError: the output is not a tensor of the input's shape.
        """
        if mode == "inference":
            with torch.no_grad():
                self._forward()
        else:
            torch.autograd.backward(self._forward(), self.grad)

    def _forward(self) -> Tensor:
        y = self.module(self.x)
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        if found != tuple(self.x.shape):
            raise ShapeError(f"expected an output of shape {tuple(self.x.shape)}, got {found}")
        return y  # type: ignore[no-any-return]

    def milliseconds(self, mode: Mode) -> float:
        """Time one call: wall-clock time, on CUDA the time between two events on the stream."""
        self.prepare(mode)
        if self.x.device.type != "cuda":
            wait: Any = getattr(torch, self.x.device.type).synchronize  # no wait on the CPU
            wait()
            began = time.perf_counter()
            self.run(mode)
            wait()
            return (time.perf_counter() - began) * 1e3
        with torch.cuda.device(self.x.device):
            event: Any = torch.cuda.Event  # its stubs have no types
            start, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            self.run(mode)
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end))


class Recipe(Protocol):
    """Picklable: another process builds the same workload from it."""

    @property
    def conditions(self) -> Conditions:
        """Threads, device, dtype, seed."""

    def workload(self, mode: Mode) -> Workload:
        """Build module and input."""
        ...


@dataclass(frozen=True)
class LayerRecipe:
    """An implementation at a shape."""

    implementation: Implementation
    shape: Shape
    conditions: Conditions

    def workload(self, mode: Mode) -> Workload:
        """Build the module and its input."""
        x = feature_map(self.shape, self.conditions)
        grad = random_like(x, self.conditions.seed) if mode == "training" else None
        module = self.implementation.build(self.shape.channels, self.conditions)
        return Workload(module, x, grad)
