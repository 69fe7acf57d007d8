"""Swap, insert and remove layers. All layers are built and tried before the model is changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullattn.swap import shapes
from fullattn.swap.inserted import Inserted
from fullattn.swap.report import Change, Report, count_parameters
from fullattn.swap.shapes import Call
from fullattn.swap.targets import Site, Target, find

__all__ = ["insert", "remove", "swap"]


def swap(
    model: nn.Module,
    target: Target,
    replacement: Callable[..., nn.Module],
    *,
    sample_input: Any = None,
    **options: Any,
) -> Report:
    """Replace modules of a model by a layer, in place.

    The layer is built as `replacement(channels, **options)` with the replaced module's number of
    output channels. If its number of input channels differs, a 1×1 convolution precedes the layer.
    Device, dtype, training mode and memory format are those of the replaced module, and a shared
    module stays shared. Shapes are inferred on a meta-device copy, in milliseconds. If the layer
    does not fit, a ValueError explains why and the model is unchanged.

    Args:
        model: the model; changed in place.
        target: what to replace: a dotted name ("classifier.0"), a glob over dotted names
            ("decoder.*.aspp"; `*` also matches dots), a module class, or a predicate of name and
            module. Of nested matches, the outermost is replaced.
        replacement: a layer class of this package, or any callable of the channel count that
            builds a module from (B, C, H, W) to the same shape.
        sample_input: input of the model: a tensor, a tuple of arguments or a mapping of keyword
            arguments. Required if a module does not state its channels; otherwise optional, and
            checks that the model calls the module with one feature map.
        options: keyword arguments for `replacement`.

    Returns:
        A report of the changes, with channels, parameters and FLOPs; prints as a table.

    Raises:
        ValueError: nothing matches the target, or only the model itself; the channels cannot be
            inferred; a replaced module changes height or width; the replacement returns another
            shape; the model does not run on the sample input.
        TypeError: wrong type of target, replacement, options or sample input.

    Example:
        >>> import torch, fullattn
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 64, 3, padding=1),
        ...     torch.nn.Conv2d(64, 32, 3, padding=1),
        ...     torch.nn.Conv2d(32, 5, 1),
        ... )
        >>> report = swap(model, "1", fullattn.FullyAttentional, project=False)
        >>> print(report)
                   old     new                    channels  parameters     FLOPs          at
        ────────────────────────────────────────────────────────────────────────────────────────────
        1          Conv2d  1×1, FullyAttentional  64 → 32   18.5K → 4.19K  37.7M → 12.7M  1×64×32×32
        the model                                           20.4K → 6.15K
        1: a 1×1 convolution from 64 to 32 channels precedes the layer
        >>> remove(report)
        >>> model[1]
        Conv2d(64, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    return _apply("swap", model, target, replacement, sample_input, options)


def insert(
    model: nn.Module,
    replacement: Callable[..., nn.Module],
    *,
    after: Target,
    sample_input: Any = None,
    **options: Any,
) -> Report:
    """Insert a layer after modules of a model, in place.

    The layer is built as `replacement(channels, **options)` with the module's number of output
    channels. With `project=False` (or `SpatialNonLocal`, whose output starts at 0) the model's
    results are unchanged bit for bit until training changes the layer. The module's name then
    refers to the pair: ".module." comes into the names of its own parameters, ".layer." into those
    of the layer. Earlier weights still load, with `strict=False` because they lack the layer's.

    Args:
        model: the model; changed in place.
        replacement: a layer class of this package, or any callable of the channel count that
            builds a module from (B, C, H, W) to the same shape.
        after: where to insert: a target as in `swap`. Of nested matches, all get a layer.
        sample_input: as in `swap`.
        options: keyword arguments for `replacement`.

    Returns:
        A report of the changes, with channels, parameters and FLOPs; prints as a table.

    Raises:
        ValueError: as in `swap`.
        TypeError: as in `swap`.

    Example:
        >>> import torch, fullattn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 5, 1))
        >>> x = torch.randn(2, 3, 33, 47)
        >>> y = model(x)
        >>> report = insert(model, fullattn.FullyAttentional, after="0", project=False)
        >>> torch.equal(model(x), y)
        True
    """
    return _apply("insert", model, after, replacement, sample_input, options)


def remove(report: Report) -> None:
    """Undo a `swap` or `insert`.

    A module that `swap` replaced is moved to its replacement's current device and dtype, and gets
    its training mode.

    Args:
        report: the result of `swap` or `insert`.

    Raises:
        ValueError: the report has been removed already, or the model has been changed since at one
            of the sites; the model is then unchanged.
        TypeError: not a report.

    Example:
        >>> import torch, fullattn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> report = insert(model, fullattn.ChannelNonLocal, after="0")
        >>> remove(report)
        >>> model
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
        )
    """
    if not isinstance(report, Report):
        raise TypeError(f"expected the report of swap or insert, got {type(report).__name__}")
    if report.removed:
        raise ValueError(f"this {report.action} has been removed already")
    for change in report.changes:
        for reference in change.site.references:
            if (found := reference.get()) is not change.new:
                raise ValueError(
                    f"cannot remove this {report.action}: expected {type(change.new).__name__} at "
                    f"{change.name!r}, got {type(found).__name__}; remove later changes first"
                )
    # In reverse order, because a later change may contain an earlier one.
    for change in reversed(report.changes):
        if not change.inserted:
            x = _first_floating(change.new)
            if x is not None:
                change.old.to(x.device, x.dtype)
            if change.old.training != change.new.training:
                change.old.train(change.new.training)
        change.site.set(change.old)
    report.removed = True


def _apply(
    action: Literal["swap", "insert"],
    model: nn.Module,
    target: Target,
    replacement: Callable[..., nn.Module],
    sample_input: Any,
    options: dict[str, Any],
) -> Report:
    """Build and try all layers, then put all of them into the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as model, got {type(model).__name__}")
    if isinstance(replacement, nn.Module) or not callable(replacement):
        raise TypeError(
            "expected a layer class or a callable of the channel count, such as "
            f"lambda channels: layer, got {type(replacement).__name__}"
        )
    if given := {"device", "dtype"} & set(options):
        raise TypeError(f"{' and '.join(sorted(given))} come from the model and cannot be options")
    sites = find(model, target, outermost=action == "swap")
    observed = None if sample_input is None else shapes.observe(model, sites, sample_input)
    build, changes = partial(replacement, **options), []
    for index, site in enumerate(sites):
        try:
            calls = observed[index] if observed else [_call_alone(site.module)]
            changes.append(_change(site, calls, build, model, inserted=action == "insert"))
        except ValueError as error:
            failed = "replace" if action == "swap" else "insert after"
            where = f"{site.name!r} ({type(site.module).__name__})"
            raise ValueError(f"cannot {failed} {where}: {error}") from error
    before = count_parameters(model)
    try:
        for change in changes:
            change.site.set(change.new)
    except BaseException:
        for change in reversed(changes):
            change.site.set(change.old)
        raise
    return Report(action, tuple(changes), before, count_parameters(model))


def _call_alone(module: nn.Module) -> Call:
    try:
        return shapes.call_alone(module)
    except ValueError as error:
        raise ValueError(f"cannot infer its channels without sample_input: {error}") from error


def _change(
    site: Site,
    calls: list[Call],
    build: Callable[[int], nn.Module],
    model: nn.Module,
    *,
    inserted: bool,
) -> Change:
    """Build the layer for one site, and check that it fits."""
    outputs = _feature_maps("return", [call.output for call in calls])
    inputs = outputs if inserted else _feature_maps("take", [call.input for call in calls])
    for taken, returned in zip(inputs, outputs, strict=True):
        if taken[2:] != returned[2:]:
            raise ValueError(
                f"it changes the size of its input from {taken[2]}×{taken[3]} to "
                f"{returned[2]}×{returned[3]}, and the layer keeps the size; replace another "
                "module, or insert the layer after this one"
            )
    in_channels, shape = inputs[0][1], outputs[0]
    layer = build(shape[1])
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"expected the replacement to build a torch.nn.Module, got {type(layer).__name__}"
        )
    layer = _match(layer, site.module, model)
    if (output := shapes.output_of(layer, shape)) != shape:
        raise ValueError(
            f"expected {type(layer).__name__} to return {tuple(shape)} for an input of that shape, "
            f"got {output if isinstance(output, str) else tuple(output)}"
        )
    change = Change(site, layer, layer, inserted, in_channels, shape[1], tuple(inputs[0]))
    if inserted:
        change.new = Inserted(site.module, layer)
        return change
    change.hooks = tuple(_hooks(site))
    if in_channels != shape[1]:
        change.adapter = _match(nn.Conv2d(in_channels, shape[1], 1), site.module, model)
        change.new = nn.Sequential(OrderedDict(adapter=change.adapter, layer=layer))
        change.new.training = layer.training
    return change


def _feature_maps(
    verb: Literal["take", "return"], given: list[torch.Size | str]
) -> list[torch.Size]:
    """Check that all calls of a module take, or return, feature maps of one number of channels."""
    found: list[torch.Size] = []
    for shape in given:
        if isinstance(shape, str) or len(shape) != 4:
            got = shape if isinstance(shape, str) else f"a tensor {tuple(shape)}"
            raise ValueError(f"expected it to {verb} one tensor (B, C, H, W), got {got}")
        found.append(shape)
    if len(channels := {shape[1] for shape in found}) > 1:
        raise ValueError(
            f"expected all of its calls to {verb} the same number of channels, "
            f"got {', '.join(map(str, sorted(channels)))}"
        )
    return found


def _tensors(*modules: nn.Module) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _first_floating(*modules: nn.Module) -> Tensor | None:
    return next((x for x in _tensors(*modules) if x.is_floating_point()), None)


def _match(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """Move a new module to the device, dtype, memory format and training mode of an old one.

    The model's other tensors decide what the old module's do not.
    """
    x = _first_floating(old, model)
    if x is not None:
        new = new.to(x.device, x.dtype)
    for x in _tensors(old, model):
        if x.dim() == 4:
            channels_last = x.is_contiguous(memory_format=torch.channels_last)
            if channels_last != x.is_contiguous():  # some shapes are both
                if channels_last:
                    new = new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                break
    return new.train(old.training)


def _hooks(site: Site) -> Iterator[str]:
    for name, module in site.module.named_modules(prefix=site.name):
        for attribute, hooks in vars(module).items():
            if attribute.endswith("_hooks") and isinstance(hooks, dict):
                kind = attribute.strip("_").removesuffix("s")
                for hook in hooks.values():
                    described = getattr(hook, "__qualname__", None) or type(hook).__name__
                    yield f"{kind} {described} of {name}"
