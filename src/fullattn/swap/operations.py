"""swap, insert and remove: everything is built and tried first, then put in at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullattn.swap import shapes
from fullattn.swap.inserted import Inserted
from fullattn.swap.report import Change, Report
from fullattn.swap.shapes import Call, Inputs
from fullattn.swap.targets import Place, Target, find

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

    The layer is built as `replacement(channels, **options)` with the channels that the replaced
    module gives out. Where it takes in another number, a 1×1 convolution comes before the layer.
    Device, dtype, training mode and memory format are those of the replaced module; a module that
    is shared stays shared. If anything fails, the model is as it was.

    Args:
        model: the model; changed in place.
        target: what to replace: a dotted name ("classifier.0"), a glob over dotted names
            ("decoder.*.aspp"; `*` also matches dots), a module class, or a predicate of name and
            module. Of matches within each other the outermost is replaced.
        replacement: a layer class of this package, or any callable of the channel count that
            builds a module from (B, C, H, W) to the same shape.
        sample_input: what the model can be called with: a tensor, a tuple of arguments or a
            mapping of keyword arguments. A copy of the model is run on it, without numbers where
            that is possible. Needed where a module does not itself say its channels; otherwise a
            check that the model calls the module as it seems to.
        options: passed on to `replacement`.

    Returns:
        What was replaced by what, with channels, parameters and FLOPs; prints as a table.

    Raises:
        ValueError: nothing matches the target, or only the model itself; channels cannot be found;
            a replaced module changes the height or width; the replacement gives another shape; the
            model does not run on the sample input.
        TypeError: target, replacement, options or sample input are not what they should be.

    Example:
        >>> import torch, fullattn
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 64, 3, padding=1),
        ...     torch.nn.Conv2d(64, 32, 3, padding=1),
        ...     torch.nn.Conv2d(32, 5, 1),
        ... )
        >>> report = swap(model, "1", fullattn.FullyAttentional, project=False)
        >>> print(report)
                   was     now                    channels  parameters     FLOPs          at
        ────────────────────────────────────────────────────────────────────────────────────────────
        1          Conv2d  1×1, FullyAttentional  64 → 32   18.5K → 4.19K  37.7M → 12.7M  1×64×32×32
        the model                                           20.4K → 6.15K
        1: a 1×1 convolution takes 64 channels to 32 first
        >>> remove(report)
        >>> model[1]
        Conv2d(64, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    _check(model, replacement, options)
    places = find(model, target, outermost=True)
    changes = []
    for place, calls in zip(places, _observed(model, places, sample_input), strict=True):
        taken, returned = _taken_and_returned(place, calls)
        layer = _built(replacement, returned[1], options, like=place.module, model=model)
        now: nn.Module = layer
        adapter = None
        if taken[1] != returned[1]:
            adapter = _as(nn.Conv2d(taken[1], returned[1], 1), like=place.module, model=model)
            now = nn.Sequential(OrderedDict(adapter=adapter, layer=layer))
            now.training = layer.training
        _try(layer, returned, place)
        changes.append(
            Change(
                place,
                now,
                layer,
                inserted=False,
                in_channels=taken[1],
                out_channels=returned[1],
                input=tuple(taken),
                adapter=adapter,
                hooks=tuple(_hooks(place)),
            )
        )
    return _carried_out("swap", model, changes)


def insert(
    model: nn.Module,
    replacement: Callable[..., nn.Module],
    *,
    after: Target,
    sample_input: Any = None,
    **options: Any,
) -> Report:
    """Put a layer behind modules of a model, in place.

    The layer is built as `replacement(channels, **options)` with the channels that the module gives
    out. With `project=False` (or `SpatialNonLocal`, whose output starts at 0) the model computes
    bit for bit what it did, until training moves the layer. The module's name now stands for the
    pair: its own parameters get ".module." into their names, the layer's ".layer."; weights of the
    model as it was still load (with `strict=False`, as the layer's are not among them).

    Args:
        model: the model; changed in place.
        replacement: a layer class of this package, or any callable of the channel count that
            builds a module from (B, C, H, W) to the same shape.
        after: behind what: a target as in `swap`. Matches within each other all get a layer.
        sample_input: as in `swap`.
        options: passed on to `replacement`.

    Returns:
        What was inserted where, with channels, parameters and FLOPs; prints as a table.

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
    _check(model, replacement, options)
    places = find(model, after, outermost=False)
    changes = []
    for place, calls in zip(places, _observed(model, places, sample_input), strict=True):
        returned = _returned(place, calls)
        layer = _built(replacement, returned[1], options, like=place.module, model=model)
        _try(layer, returned, place)
        changes.append(
            Change(
                place,
                Inserted(place.module, layer),
                layer,
                inserted=True,
                in_channels=returned[1],
                out_channels=returned[1],
                input=tuple(returned),
            )
        )
    return _carried_out("insert", model, changes)


def remove(report: Report) -> None:
    """Put the modules back that `swap` or `insert` replaced.

    A module that was away is moved to where the model has been moved meanwhile (device, dtype,
    training mode).

    Args:
        report: what `swap` or `insert` returned.

    Raises:
        ValueError: that was done already, or a place holds something else by now; then nothing is
            changed.
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
        for holder in change.place.holders:
            if (held := holder.get()) is not change.now:
                raise ValueError(
                    f"{change.name} has been changed since: expected the "
                    f"{type(change.now).__name__} of this {report.action}, found "
                    f"{type(held).__name__}; remove later changes first"
                )
    # The last change first: it may lie around an earlier one.
    for change in reversed(report.changes):
        if not change.inserted:
            _follow(change.was, change.now)
        change.place.put(change.was)
    report.removed = True


def _check(model: nn.Module, replacement: Any, options: dict[str, Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as model, got {type(model).__name__}")
    if isinstance(replacement, nn.Module):
        raise TypeError(
            "expected a layer class or a callable of the channel count, got a module of "
            f"{type(replacement).__name__}; pass the class, or lambda channels: module"
        )
    if not callable(replacement):
        raise TypeError(
            "expected a layer class or a callable of the channel count, "
            f"got {type(replacement).__name__}"
        )
    if given := {"device", "dtype"} & set(options):
        raise TypeError(f"{' and '.join(sorted(given))} come from the model, and are no options")


def _observed(model: nn.Module, places: Sequence[Place], sample_input: Any) -> list[list[Call]]:
    """How each place is called: in the model where there is a sample input, otherwise alone."""
    if sample_input is not None:
        return shapes.observe(model, places, Inputs.of(sample_input))
    return [[_alone(place)] for place in places]


def _alone(place: Place) -> Call:
    try:
        return shapes.returned_alone(place.module)
    except ValueError as error:
        raise ValueError(
            f"the channels of {place.name} ({type(place.module).__name__}) cannot be found without "
            f"sample_input: {error}"
        ) from error


def _maps(place: Place, shapes: Iterable[torch.Size | str], does: str) -> list[torch.Size]:
    """The shapes of the feature maps in several calls, which differ in size alone."""
    maps: list[torch.Size] = []
    for shape in shapes:
        if isinstance(shape, str) or len(shape) != 4:
            given = shape if isinstance(shape, str) else f"a tensor {tuple(shape)}"
            raise ValueError(f"{place.name} {does} {given}; expected one tensor (B, C, H, W)")
        maps.append(shape)
    channels = {shape[1] for shape in maps}
    if len(channels) > 1:
        raise ValueError(
            f"{place.name} is called several times and {does} different numbers of channels: "
            f"{', '.join(map(str, sorted(channels)))}"
        )
    return maps


def _returned(place: Place, calls: list[Call]) -> torch.Size:
    return _maps(place, (call.returned for call in calls), "returns")[0]


def _taken_and_returned(place: Place, calls: list[Call]) -> tuple[torch.Size, torch.Size]:
    """What goes in and comes out in the first call, if no call changes height or width."""
    ins = _maps(place, (call.taken for call in calls), "takes")
    outs = _maps(place, (call.returned for call in calls), "returns")
    for taken, returned in zip(ins, outs, strict=True):
        _check_size(place, taken, returned)
    return ins[0], outs[0]


def _check_size(place: Place, taken: torch.Size, returned: torch.Size) -> None:
    factors = " and ".join(
        f"{axis} by a factor of {returned[i] / taken[i]:.4g}"
        for i, axis in ((2, "height"), (3, "width"))
        if returned[i] != taken[i]
    )
    if factors:
        raise ValueError(
            f"{place.name} ({type(place.module).__name__}) changes the size of its input from "
            f"{taken[2]}×{taken[3]} to {returned[2]}×{returned[3]} ({factors}), and a layer keeps "
            "it; swap a module that keeps the size, or insert the layer after this one"
        )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    floating = (x for x in _tensors(module) if x.is_floating_point())
    return next(((x.device, x.dtype) for x in floating), None)


def _memory_format(module: nn.Module) -> torch.memory_format | None:
    """That of the weights, from the first which is not both at once."""
    for x in _tensors(module):
        if x.dim() == 4:
            last = x.is_contiguous(memory_format=torch.channels_last)
            if last != x.is_contiguous():
                return torch.channels_last if last else torch.contiguous_format
    return None


def _as(new: nn.Module, *, like: nn.Module, model: nn.Module) -> nn.Module:
    """Give a new module the device, dtype, memory format and training mode of another.

    What the other does not say, because it has no parameters, the model does.
    """
    known = _device_and_dtype(like) or _device_and_dtype(model)
    if known is not None:
        device, dtype = known
        new = new.to_empty(device=device) if device.type == "meta" else new.to(device)
        new = new.to(dtype)
    if (_memory_format(like) or _memory_format(model)) is torch.channels_last:
        new = new.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return new.train(like.training)


def _built(
    replacement: Callable[..., nn.Module],
    channels: int,
    options: dict[str, Any],
    *,
    like: nn.Module,
    model: nn.Module,
) -> nn.Module:
    layer = replacement(channels, **options)
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"expected the replacement to build a torch.nn.Module, got {type(layer).__name__}"
        )
    return _as(layer, like=like, model=model)


def _try(layer: nn.Module, shape: torch.Size, place: Place) -> None:
    """Raise unless the layer takes the shape and gives the same."""
    try:
        given = shapes.returned(layer, shape)
    except ValueError as error:
        raise ValueError(f"{place.name}: the replacement {error}") from error
    if given != shape:
        raise ValueError(
            f"{place.name}: expected the replacement {type(layer).__name__} to give "
            f"{tuple(shape)} for an input of that shape, "
            f"got {given if isinstance(given, str) else tuple(given)}"
        )


def _hooks(place: Place) -> Iterator[str]:
    kinds = {
        "_forward_pre_hooks": "forward pre-hook",
        "_forward_hooks": "forward hook",
        "_backward_pre_hooks": "backward pre-hook",
        "_backward_hooks": "backward hook",
        "_state_dict_hooks": "state_dict hook",
        "_load_state_dict_pre_hooks": "load_state_dict pre-hook",
    }
    for name, module in place.module.named_modules(prefix=place.name):
        for attribute, kind in kinds.items():
            for hook in getattr(module, attribute, {}).values():
                described = getattr(hook, "__qualname__", None) or type(hook).__name__
                yield f"{kind} {described} of {name}"


def _carried_out(
    action: Literal["swap", "insert"], model: nn.Module, changes: list[Change]
) -> Report:
    """Put all changes in and report; if that is interrupted, put them back."""
    before = sum(x.numel() for x in model.parameters())
    try:
        for change in changes:
            change.place.put(change.now)
    except BaseException:
        for change in reversed(changes):
            change.place.put(change.was)
        raise
    after = sum(x.numel() for x in model.parameters())
    return Report(action, tuple(changes), before, after)


def _follow(was: nn.Module, now: nn.Module) -> None:
    """Move a module that was away to where the one in its place has been moved."""
    then, today = _device_and_dtype(was), _device_and_dtype(now)
    if then is not None and today is not None and then != today:
        was.to(device=today[0], dtype=today[1])
    if was.training != now.training:
        was.train(now.training)
