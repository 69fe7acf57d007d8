"""Register forward and backward functions as PyTorch operators.

Custom operators are opaque to `torch.compile` and `torch.export`, which see one call with known
shapes and a known gradient, and PyTorch's FLOP counter has a formula for them.
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
    arguments: tuple[str, ...],
    *,
    forward: Callable[..., Any],
    forward_flops: Callable[..., int],
    empty_result: Callable[..., Any],
    backward: Callable[..., tuple[Tensor, ...]] | None = None,
    backward_flops: Callable[..., int] | None = None,
    definition: Callable[..., Tensor] | None = None,
    empty_grads: Callable[..., tuple[Tensor, ...]] | None = None,
    keeps_result: bool = False,
    optional: tuple[str, ...] = (),
    statistics: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("CPU",),
) -> Callable[..., Any]:
    """Register `fullattn::{name}` and, with a backward, `fullattn::{name}_backward`.

    Args:
        name: the operator's name.
        arguments: names of the tensor arguments.
        forward: takes the tensor arguments, a float `scale` and the flags; returns the result, or
            with `statistics` a tuple of the result and those.
        forward_flops: the forward's FLOPs from the shapes of its arguments.
        empty_result: takes what `forward` takes; returns the same, uninitialised.
        backward: takes the result's gradient, the tensor arguments, with `keeps_result` the
            result, the statistics and `scale`; returns the gradient of each tensor argument, and an
            empty tensor for an argument that is None. Without it the operator has no gradient.
        backward_flops: the backward's FLOPs from the shapes of its arguments.
        definition: takes the tensor arguments and `scale`; returns the result by PyTorch's own
            operators, which derivatives beyond the first go through. Needed with a backward.
        empty_grads: takes what `backward` takes; returns the same, uninitialised. By default every
            gradient has the memory layout of its tensor.
        keeps_result: whether the result is saved for the backward.
        optional: names of those arguments that may be None.
        statistics: names of tensors that the forward returns for the backward.
        flags: names of booleans that the forward takes after the scale.
        devices: dispatch keys of the supported devices.

    Returns:
        The operator, which is called as `forward` is.
    """
    tensors = ", ".join(f"Tensor{'?' * (each in optional)} {each}" for each in arguments)
    results = ", ".join("Tensor" for _ in ("result", *statistics))
    options = "".join(f", bool {each}" for each in flags)
    operator = _define(
        name,
        f"({tensors}, float scale{options}) -> {f'({results})' if statistics else results}",
        forward,
        forward_flops,
        empty_result,
        devices,
    )
    if backward is None or backward_flops is None or definition is None:
        return operator.default  # type: ignore[no-any-return]

    def grads_like_inputs(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        given = inputs[: len(arguments)]
        return tuple(grad.new_empty(0) if x is None else torch.empty_like(x) for x in given)

    kept = ("result",) * keeps_result + statistics
    saved = "".join(f"Tensor {each}, " for each in kept)
    grads = ", ".join("Tensor" for _ in arguments)
    backward_operator = _define(
        f"{name}_backward",
        f"(Tensor grad, {tensors}, {saved}float scale) -> ({grads})",
        backward,
        backward_flops,
        empty_grads or grads_like_inputs,
        devices,
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors, ctx.scale = inputs[: len(arguments)], inputs[len(arguments)]
        ctx.given = [x is not None for x in tensors]
        results = output if statistics else (output,)
        left = results[1:]
        # Otherwise autograd would pass zeros as gradients of the statistics.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(results if keeps_result else left))
        ctx.mark_non_differentiable(*left)

    def differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (len(arguments) + 1 + len(flags))
        found = backward_operator(grad, *ctx.saved_tensors, ctx.scale)
        tensors = (x if given else None for x, given in zip(found, ctx.given, strict=True))
        return (*tensors, None, *(None for _ in flags))

    def save_again(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.scale = inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: 1 + len(arguments)])

    def differentiate_again(ctx: Any, *upper: Tensor | None) -> tuple[Tensor | None, ...]:
        found = _second_derivative(definition, ctx.saved_tensors, ctx.scale, upper)
        return (*found, *(None for _ in kept), None)

    torch.library.register_autograd(
        f"fullattn::{name}", differentiate, setup_context=save, lib=_library
    )
    torch.library.register_autograd(
        f"fullattn::{name}_backward", differentiate_again, setup_context=save_again, lib=_library
    )
    return operator.default  # type: ignore[no-any-return]


def _second_derivative(
    definition: Callable[..., Tensor],
    inputs: tuple[Tensor | None, ...],
    scale: float,
    upper: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Differentiate the gradients of a definition, with respect to the inputs of its backward.

    Args:
        definition: takes tensors and the scale.
        inputs: the gradient of its result, and its tensors.
        scale: factor on the scores.
        upper: the gradients of the gradients of its tensors.

    Returns:
        The gradients of `inputs`; None for those that are None.
    """
    again = torch.is_grad_enabled()  # the result may be differentiated once more
    with torch.enable_grad():
        # Views, because one tensor may be several arguments, and each has its own gradient.
        views = [
            x if x is None else x.view_as(x) if again and x.requires_grad else _leaf(x)
            for x in inputs
        ]
        grad, *tensors = views
        given = [x for x in tensors if x is not None]
        first = torch.autograd.grad(definition(*tensors, scale), given, grad, create_graph=True)
        over = [each for x, each in zip(tensors, upper, strict=True) if x is not None]
        pairs = [(f, each) for f, each in zip(first, over, strict=True) if each is not None]
        second = iter(
            torch.autograd.grad(
                [f for f, _ in pairs],
                [x for x in views if x is not None],
                [each for _, each in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )
    return [None if x is None else next(second) for x in views]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _define(
    name: str,
    signature: str,
    function: Callable[..., Any],
    formula: Callable[..., int],
    fake: Callable[..., Any],
    devices: tuple[str, ...],
) -> Any:
    """Define an operator with its implementation, its fake implementation and its FLOP formula."""
    _library.define(name + signature)  # type: ignore[no-untyped-call]
    for device in devices:
        _library.impl(name, function, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fullattn::{name}", fake, lib=_library)
    operator = getattr(torch.ops.fullattn, name)
    flops.register(operator, formula)
    return operator
