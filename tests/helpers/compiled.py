"""Outputs and gradients of compiled and exported layers."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.cases import assert_near


def images(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def output_and_gradients(forward: object, layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
    assert callable(forward)
    x = x.detach().requires_grad_()
    y = forward(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def assert_same(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    size = 0.01 * max(gradient.abs().max().item() for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        assert_near(one, other, dtype, size=size)


def pooling_exports() -> bool:
    """Whether this PyTorch exports its own pooling with free sizes; 2.11 does not, 2.13 does."""
    height = torch.export.Dim("height", min=4)
    pool = torch.nn.MaxPool2d(2)
    try:
        torch.export.export(pool, tuple(images((2, 6, 8, 9))), dynamic_shapes=({2: height},))
    except torch._dynamo.exc.UserError:
        return False
    return True
