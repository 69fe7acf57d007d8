"""A user's whole network, as it is and with a layer in it: what the change costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fullattn._cli.conditions import Conditions, Mode
from fullattn._cli.errors import UsageError, describe
from fullattn._cli.inputs import noise, photograph
from fullattn._cli.loading import load_class
from fullattn._cli.shapes import Shape
from fullattn.bench.workload import Workload
from fullattn.layers import LAYERS
from fullattn.swap import Report, insert, swap

__all__ = ["Network", "NetworkWorkload"]


@dataclass(frozen=True)
class Network:
    """A network and a change to it; plain data from which any process builds the same.

    Attributes:
        factory: where its class or function is: "FILE.py:NAME" or "package.module:NAME".
        options: what the factory is called with.
        shape: of the images, (B, C, H, W).
        conditions: device, dtype, memory format, threads, seed and image.
        target: what `swap` or `insert` is to change; None to leave the network as it is.
        layer: name of a registered layer.
        layer_options: of the layer.
        behind: whether the layer is inserted behind the target, not in its place.
    """

    factory: str
    options: dict[str, Any]
    shape: Shape
    conditions: Conditions
    target: str | None = None
    layer: str = "fully"
    layer_options: dict[str, Any] = field(default_factory=dict)
    behind: bool = False

    def built(self) -> tuple[nn.Module, Report | None]:
        """Build the network with seeded weights; return it and what was changed in it.

        Raises:
            UsageError: the factory fails or builds no module, or the change cannot be made.
        """
        factory = load_class(self.factory, "model")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.conditions.seed)
            try:
                model = factory(**self.options)
            except Exception as error:
                raise UsageError(
                    f"model {self.factory!r} cannot be built with {self.options}: {describe(error)}"
                ) from error
            if not isinstance(model, nn.Module):
                raise UsageError(
                    f"expected model {self.factory!r} to build a torch.nn.Module, "
                    f"got {type(model).__name__}"
                )
            report = None if self.target is None else self._change(model, self.target)
        return self.conditions.placed(model), report

    def _change(self, model: nn.Module, target: str) -> Report:
        layer = LAYERS[self.layer]
        sample = torch.zeros(self.shape)
        try:
            if self.behind:
                return insert(model, layer, after=target, sample_input=sample, **self.layer_options)
            return swap(model, target, layer, sample_input=sample, **self.layer_options)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error

    def images(self) -> Tensor:
        """Make the input: noise, or the photograph scaled to the shape."""
        if self.conditions.image is None:
            x = noise(self.shape, self.conditions.seed)
        else:
            x = photograph(self.conditions.image, self.shape)
        return self.conditions.placed_tensor(x)

    def workload(self, mode: Mode) -> NetworkWorkload:
        """Build the network and its input."""
        return NetworkWorkload(self.built()[0], self.images(), None)


class NetworkWorkload(Workload):
    """A network and a batch of images. In training the loss is the mean square of its results."""

    corner = 64

    def prepare(self, mode: Mode) -> None:
        """Prepare as for a layer, without a gradient for the images."""
        super().prepare(mode)
        self.x.requires_grad_(False)

    def run(self, mode: Mode) -> None:
        """Call the network once: forward, and in training backward to the parameters."""
        if mode == "inference":
            with torch.no_grad():
                self.module(self.x)
        else:
            results = _tensors(self.module(self.x))
            torch.autograd.backward([y.float().square().mean() for y in results])


def _tensors(result: Any) -> list[Tensor]:
    """Collect the tensors with a gradient in a network's result."""
    if isinstance(result, Tensor):
        return [result] if result.requires_grad else []
    if isinstance(result, Mapping):
        result = list(result.values())
    return (
        [x for item in result for x in _tensors(item)] if isinstance(result, (list, tuple)) else []
    )
