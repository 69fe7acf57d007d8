"""Whole networks with a layer in them: compiled, exported, in ONNX and as AOTInductor packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullattn
from helpers.cases import assert_near
from helpers.compiled import assert_same, images, output_and_gradients
from helpers.exported import (
    EXPORT_WARNINGS,
    aot_inductor,
    free_sizes,
    needs,
    needs_compiler,
    needs_onnx,
    onnx_program,
    onnx_runtime,
)
from helpers.networks import load

pytestmark = [pytest.mark.slow, *EXPORT_WARNINGS]


class SmallNetwork(nn.Module):
    """A backbone of stride 4, a head, and its scores at the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.head = nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        scores = self.head(self.backbone(image))
        return F.interpolate(scores, size=image.shape[-2:], mode="bilinear", align_corners=False)


def lraspp() -> nn.Module:
    model: nn.Module = load("torchvision").lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    )
    return model


@dataclass(frozen=True)
class Network:
    """A segmentation network and where a layer goes in.

    Attributes:
        name: for the test's id.
        build: makes the network with random weights.
        behind: name of the module that the layer follows.
        smallest: height and width from which on the network takes every size.
        package: what it needs.
        real: whether it is of a size that makes tracing it take its time.
    """

    name: str
    build: Callable[[], nn.Module]
    behind: str
    smallest: int
    package: str = "torch"
    real: bool = True


SMALL = Network("small", SmallNetwork, "backbone", 8, real=False)
NETWORKS = (SMALL, Network("lraspp", lraspp, "backbone.16", 64, "torchvision"))
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "fully_attentional": partial(fullattn.FullyAttentional, gamma_init=0.7, project=False),
    "channel": partial(fullattn.ChannelNonLocal, gamma_init=0.7),
    "spatial": partial(fullattn.SpatialNonLocal, zero_init=False),
}


def every_layer_in(*networks: Network) -> Any:
    """Parametrise a test over networks and the layers in them.

    Of the small network `make test` takes one layer; the others are alone in the other tests.
    """
    parameters = [
        pytest.param(
            network,
            layer,
            id=f"{name}-{network.name}",
            marks=[
                needs(network.package),
                *([pytest.mark.network] if network.real or name != "fully_attentional" else []),
            ],
        )
        for network in networks
        for name, layer in LAYERS.items()
    ]
    return pytest.mark.parametrize(("network", "layer"), parameters)


def swapped(network: Network, layer: Callable[[int], nn.Module]) -> nn.Module:
    """The network with a layer behind one of its modules, ready for inference."""
    model = network.build()
    fullattn.insert(model, layer, after=network.behind, sample_input=photographs(network)[0])
    # With the statistics that a normalisation starts with, random weights let an image fade away.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    example, _ = photographs(network)
    with torch.no_grad():
        model.train()(example)
    return OneTensor(model).eval()


class OneTensor(nn.Module):
    """A network whose result is its scores alone; torchvision's return a dictionary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        scores = self.model(image)
        return scores["out"] if isinstance(scores, dict) else scores


def photographs(network: Network) -> tuple[Tensor, list[Tensor]]:
    """What a network is exported with, and three images of sizes that it has not seen then."""
    n = network.smallest
    example, *unseen = images(
        (2, 3, 2 * n, 3 * n), (1, 3, n, n + 1), (3, 3, 2 * n + 5, n), (2, 3, n + 9, 2 * n - 3)
    )
    return example, unseen


@every_layer_in(*NETWORKS)
def test_a_network_depends_on_the_layer_in_it(network: Network, layer: Any) -> None:
    # Otherwise the comparisons below would say nothing of the layer.
    model = swapped(network, layer)
    example, _ = photographs(network)
    ours = tuple(fullattn.layers.LAYERS.values())
    (inside,) = (each for each in model.modules() if isinstance(each, ours))
    with torch.no_grad():
        y = model(example)
        inside.forward = lambda x: x
        without = model(example)
    assert (y - without).abs().max() > 0.02 * without.abs().max()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_layer_in(*NETWORKS)
def test_a_network_compiled_without_graph_breaks_agrees_with_eager(
    network: Network, layer: Any, dynamic: bool
) -> None:
    model = swapped(network, layer)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    example, unseen = photographs(network)
    # A batch of one is a graph of its own to torch.compile.
    others = [x for x in unseen if len(x) > 1] if dynamic else []
    for x in [example, *others]:
        with torch.compiler.set_stance("default" if x is example else "fail_on_recompile"):
            actual = output_and_gradients(compiled, model, x)
        assert_same(actual, output_and_gradients(model, model, x), torch.float32)


@every_layer_in(*NETWORKS)
def test_a_network_exported_with_free_sizes_agrees_with_eager(network: Network, layer: Any) -> None:
    model = swapped(network, layer)
    example, unseen = photographs(network)
    program = torch.export.export(
        model, (example,), dynamic_shapes=free_sizes(network.smallest), strict=True
    )
    run = program.module()
    for x in unseen:
        assert_near(run(x), model(x), torch.float32)


@needs_onnx
@every_layer_in(*NETWORKS)
def test_a_network_in_onnx_agrees_with_eager_at_unseen_sizes(network: Network, layer: Any) -> None:
    model = swapped(network, layer)
    example, unseen = photographs(network)
    run = onnx_runtime(onnx_program(model, example, network.smallest))
    for x in unseen:
        assert_near(run(x), model(x), torch.float32)


@needs_compiler
@pytest.mark.network
@every_layer_in(*NETWORKS)
def test_a_network_in_an_aot_inductor_package_agrees_with_eager_at_unseen_sizes(
    network: Network, layer: Any, tmp_path: Path
) -> None:
    model = swapped(network, layer).requires_grad_(False)
    example, unseen = photographs(network)
    run = aot_inductor(model, example, network.smallest, tmp_path)
    for x in unseen:
        assert_near(run(x), model(x), torch.float32)
