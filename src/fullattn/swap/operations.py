"""Swap, insert, remove and replay. All layers are built and tried before the model is changed."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullattn._text import did_you_mean
from fullattn.layers import LAYERS
from fullattn.swap import rebuilt, recorded, shapes
from fullattn.swap.inserted import Home, Insertion
from fullattn.swap.report import Change, Report, count_parameters
from fullattn.swap.shapes import Call
from fullattn.swap.targets import Site, Target, find

__all__ = ["apply", "insert", "remove", "replay", "replay_unkept", "swap"]


def swap(
    model: nn.Module,
    target: Target,
    replacement: str | Callable[..., nn.Module],
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
        replacement: a layer class of this package, its short name ("fully", "channel", "spatial"),
            or any callable of the channel count that builds a module from (B, C, H, W) to the same
            shape.
        sample_input: input of the model: a tensor, a tuple of arguments or a mapping of keyword
            arguments. Required if a module does not state its channels; otherwise optional, and
            checks that the model calls the module with one feature map.
        options: keyword arguments for `replacement`.

    Returns:
        A report of the changes, with channels, parameters and FLOPs; prints as a table.

    Raises:
        ValueError: nothing matches the target, or only the model itself; no layer has the name; the
            channels cannot be inferred; a replaced module changes height or width; the replacement
            returns another shape; the model does not run on the sample input.
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
    return _change_targets("swap", model, target, replacement, sample_input, options)


def insert(
    model: nn.Module,
    replacement: str | Callable[..., nn.Module],
    *,
    after: Target,
    sample_input: Any = None,
    **options: Any,
) -> Report:
    """Insert a layer after modules of a model, in place.

    The layer is built as `replacement(channels, **options)` with the module's number of output
    channels. With `project=False` (or `SpatialNonLocal`, whose output starts at 0) the model's
    results are unchanged bit for bit until training changes the layer. The layer becomes a child of
    the module, named after its class ("layer4.fully_attentional"): the last step of an
    `nn.Sequential`, otherwise called by a forward hook of the module. All other names stay, so that
    earlier weights load, with `strict=False` because they lack the layer's.

    Args:
        model: the model; changed in place.
        replacement: a layer class of this package, its short name ("fully", "channel", "spatial"),
            or any callable of the channel count that builds a module from (B, C, H, W) to the same
            shape.
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
    return _change_targets("insert", model, after, replacement, sample_input, options)


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
        if change.insertion is not None and not change.insertion.attached:
            raise ValueError(
                f"cannot remove this {report.action}: {type(change.layer).__name__} is no longer "
                f"at {change.layer_name!r}"
            )
    # In reverse order, because a later change may contain an earlier one.
    for change in reversed(report.changes):
        if change.insertion is None:
            x = _first_floating(change.new)
            if x is not None:
                change.old.to(x.device, x.dtype)
            if change.old.training != change.new.training:
                change.old.train(change.new.training)
        change.undo()
    report.removed = True
    rebuilt.forget(report)


def replay(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
) -> Report:
    """Make a saved change again, in a newly built model.

    The layers go to the modules of the saved names, with the saved channels and options, so that
    weights saved after the change load. The model does not run. Make several changes in the order
    in which they were made first.

    Args:
        model: the model; changed in place.
        source: a file written by `Report.save`, or the result of `Report.to_dict`.
        strict: whether the model must have the saved class and names of modules. Otherwise the
            changed modules alone are compared: their names, classes and shapes of parameters.

    Returns:
        A report of the changes, as `swap` and `insert` return it.

    Raises:
        ValueError: not a saved change, one of a newer version, or of another architecture; a module
            is missing, of another class or has other channels; a class cannot be imported. The
            model is then unchanged.
        OSError: the file cannot be read.

    Example:
        >>> import torch, fullattn
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU())
        >>> first, second = build(), build()
        >>> change = insert(first, fullattn.FullyAttentional, after="0", gamma_init=0.5).to_dict()
        >>> report = replay(second, change)
        >>> second.load_state_dict(first.state_dict())
        <All keys matched successfully>
    """
    report = replay_unkept(model, source, strict=strict)
    rebuilt.keep(report)
    return report


def replay_unkept(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> Report:
    """Make a saved change, in a network whose framework has a record of it."""
    _check_model(model)
    saved = recorded.read(source)
    action: Literal["swap", "insert"] = "insert" if "insert" in saved else "swap"
    here = recorded.architecture(model)
    if strict and here != saved["model"]:
        raise ValueError(
            f"cannot replay this {action}: expected the architecture that it was saved from, "
            f"{_architecture(saved['model'])}, got {_architecture(here)}; strict=False compares "
            "the changed modules alone"
        )
    sites, observed = [], []
    for at in saved["at"]:
        site = _saved_site(model, at, action)
        height_and_width = at["input"][2:]
        call = Call(
            torch.Size((at["input"][0], at["in_channels"], *height_and_width)),
            torch.Size((at["input"][0], at["out_channels"], *height_and_width)),
        )
        home = Home(tuple(at["home"]), at["hooked"]) if action == "insert" else None
        if home is not None:
            try:
                home.within(site.module)
            except AttributeError as error:
                raise ValueError(f"cannot replay this {action}: {error}") from error
        sites.append(site)
        observed.append(([call] if home is None else [Call(call.output, call.output)], home))
    options = {name: recorded.decode(value) for name, value in saved["options"].items()}
    replacement = recorded.layer_class(saved[action])
    return apply(action, model, sites, replacement, options, observed)


def _architecture(saved: Mapping[str, Any]) -> str:
    return f"{saved['class']} of {saved['modules']} modules ({saved['names']})"


def _saved_site(model: nn.Module, at: Mapping[str, Any], action: str) -> Site:
    failed = f"cannot replay this {action}"
    name, channels = at["name"], at["out_channels"]
    try:
        (site,) = find(model, name, outermost=False)
    except ValueError as error:
        raise ValueError(f"{failed}: {error}") from error
    if (got := type(site.module).__qualname__) != at["module"]:
        raise ValueError(f"{failed}: expected a {at['module']} at {name!r}, got a {got}")
    if recorded.parameter_shapes(model, name) != at["parameters"]:
        try:
            ((call, *_), _) = _observe_alone(site.module, inserting=False)
            got = f"{call.output[1]} channels" if isinstance(call.output, torch.Size) else ""
        except ValueError:
            got = ""
        raise ValueError(
            f"{failed}: expected {name!r} to have {channels} channels and the saved shapes of "
            f"parameters, got {got if got and got != f'{channels} channels' else 'other shapes'}"
        )
    return site


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as model, got {type(model).__name__}")


def _layer_named(name: str, model: nn.Module) -> type[nn.Module]:
    if name in LAYERS:
        return LAYERS[name]
    message = f"expected a layer of {', '.join(map(repr, LAYERS))} or a class, got {name!r}"
    if name in dict(model.named_modules()):
        raise ValueError(
            f"{message}, a module of the model, which is the target: in swap the target comes "
            "first, and in insert it is after="
        )
    raise ValueError(message + did_you_mean(name, LAYERS))


def _change_targets(
    action: Literal["swap", "insert"],
    model: nn.Module,
    target: Target,
    replacement: str | Callable[..., nn.Module],
    sample_input: Any,
    options: dict[str, Any],
) -> Report:
    """Find the modules and their channels, and change them."""
    _check_model(model)
    if isinstance(replacement, str):
        replacement = _layer_named(replacement, model)
    if isinstance(replacement, nn.Module) or not callable(replacement):
        raise TypeError(
            "expected a layer class or a callable of the channel count, such as "
            f"lambda channels: layer, got an instance of {type(replacement).__name__}"
        )
    if given := {"device", "dtype"} & set(options):
        raise TypeError(f"{' and '.join(sorted(given))} come from the model and cannot be options")
    inserting = action == "insert"
    sites = find(model, target, outermost=not inserting)
    rebuilt.check(model, sites, action)
    observed = None if sample_input is None else _observe(model, sites, sample_input, inserting)
    report = apply(action, model, sites, replacement, options, observed)
    rebuilt.keep(report)
    return report


def apply(
    action: Literal["swap", "insert"],
    model: nn.Module,
    sites: list[Site],
    replacement: Callable[..., nn.Module],
    options: dict[str, Any],
    observed: list[tuple[list[Call], Home | None]] | None,
) -> Report:
    """Build and try all layers, then put all of them into the model."""
    build, changes = partial(replacement, **options), []
    for index, site in enumerate(sites):
        try:
            calls, home = (
                observed[index] if observed else _observe_alone(site.module, action == "insert")
            )
            changes.append(_change(site, calls, home, build, model))
        except ValueError as error:
            failed = "insert after" if action == "insert" else "replace"
            where = f"{site.name!r} ({type(site.module).__name__})"
            raise ValueError(f"cannot {failed} {where}: {error}") from error
    before, architecture = count_parameters(model), recorded.architecture(model)
    done: list[Change] = []
    try:
        for change in changes:
            change.make()
            done.append(change)
    except BaseException:
        for change in reversed(done):
            change.undo()
        raise
    return Report(
        action,
        model,
        replacement,
        options,
        architecture,
        tuple(changes),
        before,
        count_parameters(model),
    )


def _observe(
    model: nn.Module, sites: list[Site], sample_input: Any, inserting: bool
) -> list[tuple[list[Call], Home | None]]:
    if inserting:
        return list(shapes.find_homes(model, sites, sample_input))
    return [(calls, None) for calls in shapes.observe(model, sites, sample_input)]


def _observe_alone(module: nn.Module, inserting: bool) -> tuple[list[Call], Home | None]:
    """Run a module on a trial input without the model around it."""
    try:
        x = shapes.trial_input(module)
        if inserting:
            return shapes.find_homes(module, [Site(("it",), module, ())], x)[0]
        return [Call(x.shape, shapes.output_of(module, x.shape))], None
    except ValueError as error:
        raise ValueError(f"cannot infer its channels without sample_input: {error}") from error


def _change(
    site: Site,
    calls: list[Call],
    home: Home | None,
    build: Callable[[int], nn.Module],
    model: nn.Module,
) -> Change:
    """Build the layer for one site, and check that it fits."""
    outputs = _feature_maps("return", [call.output for call in calls])
    inputs = outputs if home else _feature_maps("take", [call.input for call in calls])
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
    change = Change(site, layer, layer, in_channels, shape[1], tuple(inputs[0]))
    change.parameter_shapes = recorded.parameter_shapes(model, site.name)
    if home is not None:
        change.new = site.module
        change.insertion = Insertion(site.module, layer, home)
        return change
    change.hooks = tuple(_hooks(site))
    if in_channels != shape[1]:
        change.adapter = _match(nn.Conv2d(in_channels, shape[1], 1), site.module, model)
        change.new = nn.Sequential(OrderedDict(adapter=change.adapter, layer=layer))
        change.new.training = layer.training
    rebuilt.replace(site.module, change.new)
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
