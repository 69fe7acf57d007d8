"""Makes a forward and a backward function into PyTorch operators.

As operators they are one call each to `torch.compile`, `torch.export` and PyTorch's FLOP counter,
with known shapes, gradient and cost, and whatever they do inside is their own business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fullattn.attention import flops

__all__ = ["register"]

_library = torch.library.Library("fullattn", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    name: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]],
    empty_result: Callable[..., Tensor],
    arguments: tuple[str, ...],
    forward_flops: Callable[..., int],
    backward_flops: Callable[..., int],
    device: str = "CPU",
) -> Callable[..., Tensor]:
    """Register `fullattn::{name}` and `fullattn::{name}_backward`.

    Args:
        name: the operator's name.
        forward: takes the tensor arguments and a float `scale`, returns the result.
        backward: takes the result's gradient, the tensor arguments and `scale`, returns the
            gradient of each tensor argument, in its shape and memory layout.
        empty_result: takes what `forward` takes, returns an uninitialised result.
        arguments: names of the tensor arguments.
        forward_flops: the forward's FLOPs from the shapes of its arguments.
        backward_flops: the backward's, from the shapes of its arguments.
        device: dispatch key of the device that both run on.

    Returns:
        The operator; called like `forward`. It can be differentiated once.
    """
    backward_name = f"{name}_backward"
    tensors = ", ".join(f"Tensor {argument}" for argument in arguments)
    grads = ", ".join("Tensor" for _ in arguments)
    _library.define(f"{name}({tensors}, float scale) -> Tensor")  # type: ignore[no-untyped-call]
    _library.define(  # type: ignore[no-untyped-call]
        f"{backward_name}(Tensor grad, {tensors}, float scale) -> ({grads})"
    )
    _library.impl(name, forward, device)  # type: ignore[no-untyped-call]
    _library.impl(backward_name, backward, device)  # type: ignore[no-untyped-call]
    operator = getattr(torch.ops.fullattn, name)
    backward_operator = getattr(torch.ops.fullattn, backward_name)

    def empty_grads(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in inputs[:-1])

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, ctx.scale = inputs
        ctx.save_for_backward(*saved)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward_operator(grad, *ctx.saved_tensors, ctx.scale), None)

    def refuse(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"fullattn::{name} can be differentiated once; "
            'use backend="reference" for second derivatives'
        )

    for full_name, fake in ((name, empty_result), (backward_name, empty_grads)):
        torch.library.register_fake(f"fullattn::{full_name}", fake, lib=_library)
    torch.library.register_autograd(
        f"fullattn::{name}", differentiate, setup_context=save, lib=_library
    )
    torch.library.register_autograd(f"fullattn::{backward_name}", refuse, lib=_library)
    flops.register(operator, forward_flops)
    flops.register(backward_operator, backward_flops)
    return operator  # type: ignore[no-any-return]
