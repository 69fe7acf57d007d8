"""Makes a forward and a backward function into PyTorch operators.

Registered as custom operators, they are opaque to `torch.compile` and `torch.export`, which see one
call with known shapes and gradient, and PyTorch's FLOP counter has a formula for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fullattn.attention import flops

__all__ = ["register", "register_inference"]

_library = torch.library.Library("fullattn", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., tuple[Tensor, ...]],
    empty_result: Callable[..., Any],
    arguments: tuple[str, ...],
    forward_flops: Callable[..., int],
    backward_flops: Callable[..., int],
    *,
    optional: tuple[str, ...] = (),
    statistics: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("CPU",),
) -> Callable[..., Any]:
    """Register `fullattn::{name}` and `fullattn::{name}_backward`.

    Args:
        name: the operator's name.
        forward: takes the tensor arguments, a float `scale` and the flags, returns the result, or
            with `statistics` a tuple of the result and those.
        backward: takes the result's gradient, the tensor arguments, the statistics and `scale`;
            returns the gradient of each tensor argument, in its shape and memory layout, and an
            empty tensor for one that is None.
        empty_result: takes what `forward` takes, returns the same uninitialised.
        arguments: names of the tensor arguments.
        forward_flops: the forward's FLOPs from the shapes of its arguments.
        backward_flops: the backward's, from the shapes of its arguments.
        optional: names of those arguments that may be None.
        statistics: names of tensors that the forward leaves for the backward.
        flags: names of booleans that the forward takes after the scale.
        devices: dispatch keys of the devices that both run on.

    Returns:
        The operator; called like `forward`. It can be differentiated once.
    """
    backward_name = f"{name}_backward"
    tensors = ", ".join(f"Tensor{'?' * (each in optional)} {each}" for each in arguments)
    saved = "".join(f"Tensor {each}, " for each in statistics)
    results = ", ".join("Tensor" for _ in ("result", *statistics))
    grads = ", ".join("Tensor" for _ in arguments)
    options = "".join(f", bool {each}" for each in flags)
    _library.define(  # type: ignore[no-untyped-call]
        f"{name}({tensors}, float scale{options}) -> {f'({results})' if statistics else results}"
    )
    _library.define(  # type: ignore[no-untyped-call]
        f"{backward_name}(Tensor grad, {tensors}, {saved}float scale) -> ({grads})"
    )
    operator = getattr(torch.ops.fullattn, name)
    backward_operator = getattr(torch.ops.fullattn, backward_name)
    for device in devices:
        _library.impl(name, forward, device)  # type: ignore[no-untyped-call]
        _library.impl(backward_name, backward, device)  # type: ignore[no-untyped-call]

    def empty_grads(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        given = inputs[: len(arguments)]
        return tuple(grad.new_empty(0) if x is None else torch.empty_like(x) for x in given)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.scale = inputs[: len(arguments)], inputs[len(arguments)]
        ctx.given = [x is not None for x in tensors]
        left = output[1:] if statistics else ()
        # Or the backward would get zeros of the size of each statistic.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *left)
        ctx.mark_non_differentiable(*left)

    def differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (len(arguments) + 1 + len(flags))
        found = backward_operator(grad, *ctx.saved_tensors, ctx.scale)
        tensors = (x if given else None for x, given in zip(found, ctx.given, strict=True))
        return (*tensors, None, *(None for _ in flags))

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
    return operator.default  # type: ignore[no-any-return]


def register_inference(
    name: str,
    forward: Callable[..., Tensor],
    empty_result: Callable[..., Tensor],
    arguments: tuple[str, ...],
    forward_flops: Callable[..., int],
) -> Callable[..., Any]:
    """Register `fullattn::{name}`, which runs on the CPU and has no gradient.

    Args:
        name: the operator's name.
        forward: takes the tensor arguments and a float `scale`, returns the result.
        empty_result: takes what `forward` takes, returns the same uninitialised.
        arguments: names of the tensor arguments.
        forward_flops: FLOPs from the shapes of the arguments.

    Returns:
        The operator; called like `forward`.
    """
    tensors = ", ".join(f"Tensor {each}" for each in arguments)
    _library.define(f"{name}({tensors}, float scale) -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl(name, forward, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fullattn::{name}", empty_result, lib=_library)
    operator = getattr(torch.ops.fullattn, name)
    flops.register(operator, forward_flops)
    return operator.default  # type: ignore[no-any-return]
