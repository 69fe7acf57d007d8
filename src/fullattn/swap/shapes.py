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
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fullattn import costs
from fullattn.swap.inserted import Inserted
from fullattn.swap.targets import Site

__all__ = ["Call", "call_alone", "count_flops", "observe", "output_of"]

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
        if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
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


class _Recorder(Inserted):
    """Replaces a module in a copy of a model, and records the calls that reach it there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, nn.Identity())
        self.calls: list[Call] = []
        self.module_calls = 0  # also through references that the recorder did not replace
        module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: Any) -> None:
        self.module_calls += 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module and record the shapes."""
        result = self.module(*args, **kwargs)
        alone = len(args) == 1 and not kwargs
        given = _shape(args[0]) if alone else _describe_arguments((args, kwargs))
        self.calls.append(Call(given, _shape(result)))
        return result


def observe(model: nn.Module, sites: Sequence[Site], sample_input: Any) -> list[list[Call]]:
    """Run a copy of a model once and record the calls of each site, at least one.

    Raises:
        TypeError: the sample input has no tensor in it.
        ValueError: the model does not run on the sample input, does not call a module, or calls it
            through a reference that the site does not have.
    """
    given = _arguments(sample_input)
    recorders: list[_Recorder] = []

    def record(copied: nn.Module, memo: dict[int, Any]) -> None:
        recorders[:] = [_Recorder(memo[id(site.module)]) for site in sites]
        for site, recorder in zip(sites, recorders, strict=True):
            for reference in site.references:
                dataclasses.replace(reference, owner=memo[id(reference.owner)]).set(recorder)

    copied, moved, _ = _run_a_copy(model, given, record)
    if not all(recorder.calls for recorder in recorders):
        # For a module that only training calls, such as an auxiliary head.
        with contextlib.suppress(Exception):
            _run(copied.train(), moved)
    for site, recorder in zip(sites, recorders, strict=True):
        if recorder.module_calls > len(recorder.calls):
            raise ValueError(
                f"cannot replace {site.name!r}: the model calls it through a reference that is not "
                "a registered submodule (for example a closure or tuple)"
            )
        if not recorder.calls:
            raise ValueError(
                f"cannot replace {site.name!r}: the model does not call {site.name!r} when it runs "
                f"on {_describe_arguments(given)}"
            )
    return [recorder.calls for recorder in recorders]


def output_of(module: nn.Module, shape: Sequence[int]) -> torch.Size | str:
    """Infer the shape of a module's output for a feature map; a description if not one tensor.

    Raises:
        ValueError: the module does not run on the feature map.
    """
    return _shape(_run_a_copy(module, _feature_map(module, shape))[2])


def _feature_map(module: nn.Module, shape: Sequence[int]) -> Arguments:
    dtypes = (x.dtype for x in module.parameters() if x.is_floating_point())
    return (torch.zeros(*shape, dtype=next(dtypes, torch.float32)),), {}


def call_alone(module: nn.Module) -> Call:
    """Infer the shapes of a module without the model around it, at a trial size.

    Raises:
        ValueError: no submodule states its channels, the module takes several arguments, or it
            does not run.
    """
    called = module
    while isinstance(called, Inserted):
        called = called.module
    parameters = list(inspect.signature(called.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        raise ValueError(f"its forward takes ({', '.join(map(str, parameters))})")
    stated = (getattr(m, name, None) for m in module.modules() for name in _CHANNEL_ATTRIBUTES)
    channels = next((c for c in stated if type(c) is int and c > 0), None)
    if channels is None:
        raise ValueError(f"neither it nor a submodule has {' or '.join(_CHANNEL_ATTRIBUTES)}")
    shape = torch.Size((1, channels, _TRIAL_SIZE, _TRIAL_SIZE))
    return Call(shape, output_of(module, shape))


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
