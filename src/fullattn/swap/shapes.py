"""What shapes go in and out of a model's modules, seen on a copy, so that the model stays as it is.

The copy has the model's structure and hooks, but its tensors are on the meta device: a pass through
it computes shapes alone, takes milliseconds, and whatever a module counts, caches or stores in
passing is the copy's. A model that needs numbers to run (it branches on a value) gets a second copy
which shares the parameters and has its own buffers.
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fullattn.swap.inserted import Inserted
from fullattn.swap.targets import Place

__all__ = ["Call", "Inputs", "count_flops", "observe", "returned", "returned_alone"]

_TRIAL = 32  # height and width of the input that a module is tried with on its own


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward pass.

    Attributes:
        args: by position.
        kwargs: by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, sample: Any) -> Inputs:
        """A tuple is several arguments, a mapping is keyword arguments, all else is one argument.

        Raises:
            TypeError: it holds no tensor.
        """
        if not _tensors_in(sample):
            hint = "; did you mean torch.zeros of that shape?" if isinstance(sample, tuple) else ""
            raise TypeError(f"expected a sample_input with tensors, got {sample!r}{hint}")
        if isinstance(sample, Mapping):
            return cls((), sample)
        return cls(sample if isinstance(sample, tuple) else (sample,))

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with every tensor replaced."""
        return Inputs(_map_tensors(function, self.args), _map_tensors(function, self.kwargs))

    def __str__(self) -> str:
        named = [f"{name}={_words(value)}" for name, value in (self.kwargs or {}).items()]
        return ", ".join([*map(_words, self.args), *named])

    def into(self, module: nn.Module) -> Any:
        """Call a module with them."""
        return module(*self.args, **(self.kwargs or {}))


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        taken: shape of its argument where that is one tensor; otherwise what it is called with, in
            words.
        returned: shape of its result where that is one tensor; otherwise what it is, in words.
    """

    taken: torch.Size | str
    returned: torch.Size | str


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A structure of tuples, lists and mappings with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        mapped = [_map_tensors(function, item) for item in value]
        return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)
    if isinstance(value, list):
        return [_map_tensors(function, item) for item in value]
    if isinstance(value, Mapping):
        return {key: _map_tensors(function, item) for key, item in value.items()}
    return value


def _tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    _map_tensors(note, value)
    return found


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _sharing(tensor: Tensor) -> Tensor:
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()


def _copy(
    model: nn.Module, tensors: Callable[[Tensor], Tensor]
) -> tuple[nn.Module, dict[int, Any]]:
    """A copy of a model in eval mode with other tensors, and what became of everything, by id."""
    memo: dict[int, Any] = {}
    try:
        for module in model.modules():
            for held in (module._parameters, module._buffers, vars(module)):
                for value in held.values():
                    if isinstance(value, Tensor) and id(value) not in memo:
                        other = tensors(value)
                        if isinstance(value, nn.Parameter):
                            other = nn.Parameter(other, requires_grad=False)
                        memo[id(value)] = other
            # A module has a dozen empty collections of hooks, most of what deepcopy is slow with.
            for value in vars(module).values():
                if type(value) in (OrderedDict, set) and not value:
                    memo[id(value)] = type(value)()
        return copy.deepcopy(model, memo).eval(), memo
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied to find its shapes "
            f"({type(error).__name__}: {error}); change it before it is wrapped, and after lazy "
            "modules have their parameters"
        ) from error


class _ShapesAlone(TorchFunctionMode):
    """Gives two shapes at once that PyTorch computes numbers for on meta, and takes long to."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return torch.empty_like(args[0])
        if func is F.interpolate:
            return _interpolated(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _interpolated(
    x: Tensor, size: Any = None, scale_factor: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    sides = x.shape[2:]
    if size is None:
        factors = scale_factor if isinstance(scale_factor, (tuple, list)) else [scale_factor]
        factors = list(factors) * (len(sides) // len(factors))
        size = [int(side * factor) for side, factor in zip(sides, factors, strict=True)]
    elif not isinstance(size, (tuple, list)):
        size = [size] * len(sides)
    return x.new_empty(*x.shape[:2], *size)


def _run(copied: nn.Module, inputs: Inputs) -> Any:
    device = next((x.device for x in _tensors_in((inputs.args, inputs.kwargs))), None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if device is not None and device.type == "meta":
            # What a forward pass makes without naming a device is made there as well.
            stack.enter_context(torch.device("meta"))
            stack.enter_context(_ShapesAlone())
        else:
            stack.enter_context(torch.random.fork_rng())
        return inputs.into(copied)


def _run_a_copy(
    model: nn.Module,
    inputs: Inputs,
    prepare: Callable[[nn.Module, dict[int, Any]], object] = lambda copied, memo: None,
) -> tuple[nn.Module, Inputs, Any]:
    """Run a copy of a model: first without numbers, then, if that fails, with them.

    Args:
        model: the model.
        inputs: what to call it with.
        prepare: called with the copy, and what became of everything by id, before it runs.

    Returns:
        The copy that ran, the inputs that it ran on, and its result.

    Raises:
        ValueError: it does not run.
    """
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    attempts = (
        (_on_meta, inputs.map(_on_meta)),
        (_sharing, inputs.map(lambda x: x.detach().to(device))),
    )
    failure: Exception | None = None
    for tensors, given in attempts:
        copied, memo = _copy(model, tensors)
        prepare(copied, memo)
        try:
            return copied, given, _run(copied, given)
        except Exception as error:
            failure = error
    lines = str(failure).strip().splitlines() or [""]
    raise ValueError(
        f"{type(model).__name__} does not run on {inputs}: {type(failure).__name__}: {lines[0]}"
    ) from failure


class _Watched(Inserted):
    """Takes a module's place in a copy of a model, and notes how it is called from there."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, nn.Identity())
        self.calls: list[Call] = []
        self.called = 0
        module.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: Any) -> None:
        self.called += 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module and note the shapes."""
        result = self.module(*args, **kwargs)
        taken = str(Inputs(args, kwargs)) if kwargs else _shape_or_words(*args)
        self.calls.append(Call(taken, _shape_or_words(result)))
        return result


def observe(model: nn.Module, places: Sequence[Place], inputs: Inputs) -> list[list[Call]]:
    """Run a copy of a model once and note how the modules at some places are called.

    Args:
        model: the model; it is not changed.
        places: places in it.
        inputs: what to call the model with.

    Returns:
        The calls of each place; at least one of each.

    Raises:
        ValueError: the model does not run on these inputs, does not call a module on them, or
            calls it by a reference that the place does not know.
    """
    watched: list[_Watched] = []

    def watch(copied: nn.Module, memo: dict[int, Any]) -> None:
        watched[:] = [_Watched(memo[id(place.module)]) for place in places]
        for place, watching in zip(places, watched, strict=True):
            for holder in place.holders:
                dataclasses.replace(holder, owner=memo[id(holder.owner)]).put(watching)

    copied, given, _ = _run_a_copy(model, inputs, watch)
    if not all(watching.calls for watching in watched):
        # Such as an auxiliary head, which training alone uses.
        with contextlib.suppress(Exception):
            _run(copied.train(), given)
    for place, watching in zip(places, watched, strict=True):
        if watching.called > len(watching.calls):
            raise ValueError(
                f"the model calls {place.name} by a reference of its own, which cannot be changed "
                "from outside"
            )
        if not watching.calls:
            raise ValueError(f"the model does not call {place.name} when it runs on {inputs}")
    return [watching.calls for watching in watched]


def returned(module: nn.Module, shape: Sequence[int]) -> torch.Size | str:
    """What a module gives for a feature map: the shape, or in words what else it is.

    Args:
        module: the module; it is not changed.
        shape: of the feature map.

    Returns:
        The shape, or words.

    Raises:
        ValueError: the module does not run on that.
    """
    return _shape_or_words(_run_a_copy(module, _feature_map(module, shape))[2])


def _feature_map(module: nn.Module, shape: Sequence[int]) -> Inputs:
    dtypes = (x.dtype for x in module.parameters() if x.is_floating_point())
    return Inputs((torch.zeros(*shape, dtype=next(dtypes, torch.float32)),))


def returned_alone(module: nn.Module) -> Call:
    """Find what a module does to a feature map without the model around it.

    Args:
        module: the module; it is not changed.

    Returns:
        A call of it at a trial size.

    Raises:
        ValueError: it does not say its channels, takes more than a feature map, or does not run.
    """
    called = module
    while isinstance(called, Inserted):
        called = called.module
    parameters = list(inspect.signature(called.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        raise ValueError(f"it takes {', '.join(map(str, parameters)) or 'nothing'}")
    channels = next(filter(None, map(_says_channels, module.modules())), None)
    if channels is None:
        raise ValueError("nothing in it says channels (in_channels, num_features, channels)")
    shape = torch.Size((1, channels, _TRIAL, _TRIAL))
    return Call(shape, returned(module, shape))


def _says_channels(module: nn.Module) -> int | None:
    for attribute in ("in_channels", "num_features", "num_channels", "channels"):
        value = getattr(module, attribute, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def count_flops(module: nn.Module, shape: Sequence[int]) -> int | None:
    """FLOPs of a module on a feature map: 2 for each multiplication with an addition.

    Args:
        module: the module; it is not changed.
        shape: of the feature map.

    Returns:
        What PyTorch's counter counts in a forward pass; None if the module does not run on that.
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings Triton along, which takes time

    counts: list[int] = []
    with contextlib.suppress(ValueError):
        counter = FlopCounterMode(display=False)
        with counter:
            _run_a_copy(module, _feature_map(module, shape))
        counts.append(int(counter.get_total_flops()))
    return counts[0] if counts else None


def _shape_or_words(*values: Any) -> torch.Size | str:
    if len(values) == 1 and isinstance(values[0], Tensor):
        return values[0].shape
    return " and ".join(map(_words, values)) or "nothing"


def _words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(repr, value))}"
    return f"{value!r}" if value is None or isinstance(value, (bool, int)) else type(value).__name__
