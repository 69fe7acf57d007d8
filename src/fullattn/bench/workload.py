"""One contender with its input, ready to be called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullattn._cli.conditions import Conditions, Mode
from fullattn._cli.inputs import feature_map, random_like
from fullattn._cli.shapes import Shape
from fullattn.bench.implementations import Contender, build

__all__ = ["ShapeError", "Workload"]


class ShapeError(RuntimeError):
    """A contender returned something other than a tensor of its input's shape."""


class Workload:
    """A contender's module and its input.

    Args:
        module: what is measured.
        x: the input, (B, C, H, W).
        grad: the gradient of the output in training; None where only inference is measured.
    """

    def __init__(self, module: nn.Module, x: Tensor, grad: Tensor | None) -> None:
        self.module, self.x, self.grad = module, x, grad

    @classmethod
    def of(cls, contender: Contender, shape: Shape, conditions: Conditions, mode: Mode) -> Workload:
        """Build everything that one measurement needs."""
        x = feature_map(shape, conditions)
        grad = random_like(x, conditions.seed) if mode == "training" else None
        return cls(build(contender, shape.channels, conditions), x, grad)

    def smaller(self, side: int = 16) -> Workload:
        """The same module on a corner of the input, to warm up with."""
        x = self.x[..., :side, :side].clone()
        grad = None if self.grad is None else self.grad[..., :side, :side].clone()
        return Workload(self.module, x, grad)

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
        if not isinstance(y, Tensor):
            raise ShapeError(
                f"expected an output of shape {tuple(self.x.shape)}, got {type(y).__name__}"
            )
        if y.shape != self.x.shape:
            raise ShapeError(
                f"expected an output of shape {tuple(self.x.shape)}, got {tuple(y.shape)}"
            )
        return y
