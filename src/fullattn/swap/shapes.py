"""Infer the input and output shapes of a model's modules without changing the model.

A copy of the model with tensors on the meta device computes shapes alone, in milliseconds. A model
that branches on a tensor's value does not run there; a second copy, which shares the parameters and
clones the buffers, then runs on real tensors.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fullattn import costs
from fullattn._versions import eager
from fullattn.swap.inserted import Home
from fullattn.swap.targets import Site

__all__ = ["Call", "count_flops", "find_homes", "observe", "output_of", "trial_input"]

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs

_TRIAL_SIZE = 32  # height and width of the input of a module that is run alone
_CHANNEL_ATTRIBUTES = ("in_channels", "num_features", "num_channels", "channels")


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        input: shape of its argument if that is one tensor; otherwise a description.
        output: shape of its result if that is one tensor; otherwise a description.
    """

    input: torch.Size | str
    output: torch.Size | str


def _arguments(sample: Any) -> Arguments:
    """Convert a tuple of arguments, a mapping of keyword arguments or one argument."""
    sample = dict(sample) if isinstance(sample, Mapping) else sample
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(sample)):
        hint = "; did you mean torch.zeros of that shape?" if isinstance(sample, tuple) else ""
        raise TypeError(f"expected a sample_input with tensors, got {sample!r}{hint}")
    if isinstance(sample, dict):
        return (), sample
    return sample if isinstance(sample, tuple) else (sample,), {}


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _share_or_clone(tensor: Tensor) -> Tensor:
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _copy(
    model: nn.Module, convert: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, dict[int, Any]]:
    """Copy a model in eval mode with converted tensors; return also deepcopy's memo."""
    memo: dict[int, Any] = {}
    try:
        for module in model.modules():
            tensors = (*module._parameters.values(), *module._buffers.values())
            for value in (*tensors, *vars(module).values()):
                if isinstance(value, nn.Parameter):
                    memo[id(value)] = nn.Parameter(convert(value), requires_grad=False)
                elif isinstance(value, Tensor):
                    memo[id(value)] = convert(value)
                # deepcopy would spend most of its time on a module's empty collections of hooks.
                elif type(value) in (OrderedDict, set) and not value:
                    memo[id(value)] = type(value)()
        return copy.deepcopy(model, memo).eval(), memo
    except Exception as error:
        raise ValueError(
            f"cannot copy {type(model).__name__} to infer its shapes "
            f"({type(error).__name__}: {error}); change it before it is wrapped, and after lazy "
            "modules have their parameters"
        ) from error


def _run(module: nn.Module, given: Arguments) -> Any:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eager())
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(given)):
            # Tensors that a forward pass creates without a device go there as well.
            stack.enter_context(torch.device("meta"))
        else:
            stack.enter_context(torch.random.fork_rng())
        args, kwargs = given
        return module(*args, **kwargs)


def _run_a_copy(
    model: nn.Module,
    given: Arguments,
    prepare: Callable[[nn.Module, dict[int, Any]], object] = lambda copied, memo: None,
) -> tuple[nn.Module, Arguments, Any]:
    """Run a copy of a model on the meta device or, if that fails, on real tensors.

    `prepare` is called with the copy and deepcopy's memo before the copy runs.

    Returns:
        The copy, its arguments, and its result.
    """
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    failure: Exception | None = None
    for convert, target in ((_to_meta, "meta"), (_share_or_clone, device)):
        copied, memo = _copy(model, convert)
        moved: Arguments = tree_map_only(Tensor, methodcaller("to", target), given)
        prepare(copied, memo)
        try:
            return copied, moved, _run(copied, moved)
        except Exception as error:
            failure = error
    lines = str(failure).strip().splitlines() or [""]
    raise ValueError(
        f"{type(model).__name__} does not run on {_describe_arguments(given)}: "
        f"{type(failure).__name__}: {lines[0]}"
    ) from failure


class _Probe(nn.Module):
    """A child that shows whether a module calls all of its children."""

    calls = 0
    result: Any = None

    def forward(self, x: Any) -> Any:
        """Return x."""
        self.calls += 1
        self.result = x
        return x


class _Watch:
    """Records the calls of one module in a copy of a model.

    Args:
        module: the module in the copy.
        home: names that lead from it to the one that gets a probe; None for no probe.
    """

    def __init__(self, module: nn.Module, home: tuple[str, ...] | None) -> None:
        self.calls: list[Call] = []
        self.elsewhere = 0  # calls through references that `stand_in` did not replace
        self.probe = _Probe()
        self.in_order = home == ()
        self.module = module
        if home is not None:
            Home(home).within(module).add_module("fullattn_probe", self.probe)
            self.module.register_forward_hook(self._record, with_kwargs=True)

    def stand_in(self) -> nn.Module:
        """Return a shallow copy to call in the module's place."""
        module = copy.copy(self.module)
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                vars(module)[name] = value.copy()
        module.register_forward_hook(self._record, with_kwargs=True)
        self.module.register_forward_pre_hook(self._count)
        return module

    def _count(self, module: nn.Module, args: Any) -> None:
        self.elsewhere += 1

    def _record(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        alone = len(args) == 1 and not kwargs
        given = _shape(args[0]) if alone else _describe_arguments((args, kwargs))
        self.calls.append(Call(given, _shape(result)))
        self.in_order &= self.probe.calls == len(self.calls) and self.probe.result is result


def observe(model: nn.Module, sites: Sequence[Site], sample_input: Any) -> list[list[Call]]:
    """Run a copy of a model once and record the calls of each site, at least one.

    Raises:
        TypeError: the sample input has no tensor in it.
        ValueError: the model does not run on the sample input, does not call a module, or calls it
            through a reference that the site does not have.
    """
    given = _arguments(sample_input)
    watches: list[_Watch] = []

    def watch(copied: nn.Module, memo: dict[int, Any]) -> None:
        watches[:] = [_Watch(memo[id(site.module)], None) for site in sites]
        for site, watching in zip(sites, watches, strict=True):
            stand_in = watching.stand_in()
            for reference in site.references:
                dataclasses.replace(reference, owner=memo[id(reference.owner)]).set(stand_in)

    _run_until_called(model, given, watch, watches)
    for site, watching in zip(sites, watches, strict=True):
        if watching.elsewhere:
            raise ValueError(
                f"cannot replace {site.name!r}: the model calls it through a reference that is not "
                "a registered submodule (for example a closure or tuple)"
            )
    return [_called(site, watching, given) for site, watching in zip(sites, watches, strict=True)]


def find_homes(
    model: nn.Module, sites: Sequence[Site], sample_input: Any
) -> list[tuple[list[Call], Home]]:
    """Run a copy of a model, record the calls of each site and find where a layer can live there.

    A child of a module is no place for the layer if the module calls all of its children in its own
    way, as DenseNet's blocks do. The layer then becomes a child of the module's last child.

    Raises:
        TypeError: the sample input has no tensor in it.
        ValueError: the model does not run on the sample input, or does not call a module.
    """
    given = _arguments(sample_input)
    paths: list[tuple[str, ...]] = [()] * len(sites)
    watches: list[_Watch] = []

    def watch(copied: nn.Module, memo: dict[int, Any]) -> None:
        modules = (memo[id(site.module)] for site in sites)
        watches[:] = map(_Watch, modules, paths)

    while True:
        failure: ValueError | None = None
        watches.clear()
        try:
            _run_until_called(model, given, watch, watches)
        except ValueError as error:  # a probe may have got what only the other children can take
            failure = error
        moved = False
        for index, (site, watching) in enumerate(zip(sites, watches, strict=False)):
            if watching.probe.calls and (failure or not watching.in_order):
                children = list(Home(paths[index]).within(site.module)._modules)
                if children:
                    paths[index] = (*paths[index], children[-1])
                    moved = True
        if failure is not None and not moved:
            raise failure
        if not moved:
            break
    return [
        (_called(site, watching, given), Home(path, hooked=not watching.in_order))
        for site, watching, path in zip(sites, watches, paths, strict=True)
    ]


def _run_until_called(
    model: nn.Module,
    given: Arguments,
    prepare: Callable[[nn.Module, dict[int, Any]], object],
    watches: list[_Watch],
) -> None:
    copied, moved, _ = _run_a_copy(model, given, prepare)
    if not all(watching.calls for watching in watches):
        # For a module that only training calls, such as an auxiliary head.
        with contextlib.suppress(Exception):
            _run(copied.train(), moved)


def _called(site: Site, watching: _Watch, given: Arguments) -> list[Call]:
    if not watching.calls:
        raise ValueError(
            f"the model does not call {site.name!r} when it runs on {_describe_arguments(given)}"
        )
    return watching.calls


def output_of(module: nn.Module, shape: Sequence[int]) -> torch.Size | str:
    """Infer the shape of a module's output for a feature map; a description if not one tensor.

    Raises:
        ValueError: the module does not run on the feature map.
    """
    return _shape(_run_a_copy(module, _feature_map(module, shape))[2])


def _feature_map(module: nn.Module, shape: Sequence[int]) -> Arguments:
    dtypes = (x.dtype for x in module.parameters() if x.is_floating_point())
    return (torch.zeros(*shape, dtype=next(dtypes, torch.float32)),), {}


def trial_input(module: nn.Module) -> Tensor:
    """Make a feature map on which a module can run without the model around it.

    Raises:
        ValueError: no submodule states its channels, or the module takes several arguments.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        raise ValueError(f"its forward takes ({', '.join(map(str, parameters))})")
    stated = (getattr(m, name, None) for m in module.modules() for name in _CHANNEL_ATTRIBUTES)
    channels = next((c for c in stated if type(c) is int and c > 0), None)
    if channels is None:
        raise ValueError(f"neither it nor a submodule has {' or '.join(_CHANNEL_ATTRIBUTES)}")
    ((x,), _) = _feature_map(module, (1, channels, _TRIAL_SIZE, _TRIAL_SIZE))
    return x  # type: ignore[no-any-return]


def count_flops(module: nn.Module, shape: Sequence[int]) -> int | None:
    """FLOPs of a module on a feature map: 2 for each multiplication with an addition.

    Args:
        module: the module; it is not changed.
        shape: of the feature map.

    Returns:
        What PyTorch's counter counts in a forward pass; None if the module does not run on that.
    """
    with contextlib.suppress(ValueError):
        return costs.counted_flops(lambda: _run_a_copy(module, _feature_map(module, shape)))
    return None


def _shape(value: Any) -> torch.Size | str:
    return value.shape if isinstance(value, Tensor) else _describe(value)


def _describe_arguments(given: Arguments) -> str:
    named = [f"{name}={_describe(value)}" for name, value in given[1].items()]
    return ", ".join([*map(_describe, given[0]), *named]) or "nothing"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, value))}"
    return repr(value) if value is None or isinstance(value, (bool, int)) else type(value).__name__
