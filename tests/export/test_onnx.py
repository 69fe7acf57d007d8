"""The layers leave PyTorch: ONNX, AOTInductor packages, and both of whole networks.

Every program is written once, with free batch, height and width, and run at sizes that it has not
seen. `tests/test_compile.py` has torch.compile and torch.export of the layers alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullattn
from helpers.cases import (
    CASES,
    CHANNEL,
    FULLY_ATTENTIONAL,
    SPATIAL,
    SPATIAL_GAUSSIAN,
    Case,
    assert_near,
)
from helpers.compiled import assert_same, images, output_and_gradients, pooling_exports
from helpers.networks import load

pytestmark = [
    pytest.mark.slow,
    # torch.export's own copies of its own trees, and a PyTorch module that AOTInductor imports.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
]


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip where a package is not installed, and say which."""
    missing = [name for name in packages if find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}, not installed")


needs_onnx = needs("onnx", "onnxscript", "onnxruntime")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")),
    reason="needs a C++ compiler, found none",
)


@pytest.fixture(autouse=True)
def _same_weights_and_no_compiled_code() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def free_sizes(smallest: int) -> tuple[dict[int, Any], ...]:
    """Dynamic shapes of one feature map whose channels alone are fixed."""
    return (
        {
            0: torch.export.Dim("batch"),
            2: torch.export.Dim("height", min=smallest),
            3: torch.export.Dim("width", min=smallest),
        },
    )


def smallest_size(layer: nn.Module) -> int:
    """From where the layer's height and width are free."""
    subsample = getattr(layer, "subsample", 1)
    if subsample > 1 and not pooling_exports():
        pytest.skip("this version of PyTorch does not export max_pool2d with free sizes")
    # PyTorch fixes a pooled size that may be 1, so a subsampled layer starts at twice the pooling.
    return 2 * subsample


def onnx_program(model: nn.Module, x: Tensor, smallest: int) -> bytes:
    """The model as ONNX, with free batch, height and width."""
    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=free_sizes(smallest), verbose=False
    )
    assert program is not None
    written: bytes = program.model_proto.SerializeToString()
    return written


def onnx_runtime(program: bytes) -> Callable[[Tensor], Tensor]:
    """A function that runs an ONNX program."""
    import onnxruntime

    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert [given.shape[axis] for axis in (0, 2, 3)] == ["batch", "height", "width"]

    def run(x: Tensor) -> Tensor:
        return torch.as_tensor(session.run(None, {given.name: x.numpy()})[0])

    return run


# Of which none is the exported (2, 6, 8, 9).
UNSEEN = ((3, 6, 7, 5), (1, 6, 5, 13), (5, 6, 4, 31))

FORMS: dict[str, Callable[[], nn.Module]] = {
    **{case.name: partial(case.build, 6, torch.float32) for case in CASES},
    "fully_attentional-projected": partial(fullattn.FullyAttentional, 6, gamma_init=0.7),
    "fully_attentional-scaled": partial(FULLY_ATTENTIONAL.build, 6, torch.float32, scale=None),
    "channel-scaled": partial(CHANNEL.build, 6, torch.float32, scale=None),
    "spatial-normalised": partial(fullattn.SpatialNonLocal, 6, zero_init=False),
}


@needs_onnx
@pytest.mark.parametrize("build", FORMS.values(), ids=FORMS)
def test_onnx_agrees_with_eager_at_unseen_sizes(build: Callable[[], nn.Module]) -> None:
    layer = build().eval()
    run = onnx_runtime(onnx_program(layer, *images((2, 6, 8, 9)), smallest_size(layer)))
    for x in images(*UNSEEN):
        assert_near(run(x), layer(x), torch.float32)


@needs_onnx
@pytest.mark.parametrize("case", [FULLY_ATTENTIONAL, CHANNEL, SPATIAL], ids=lambda case: case.name)
def test_onnx_in_float16_agrees_with_eager_at_unseen_sizes(case: Case) -> None:
    layer = case.build(6, torch.float16).eval()
    (example,) = images((2, 6, 8, 9), dtype=torch.float16)
    run = onnx_runtime(onnx_program(layer, example, 2))
    for x in images(*UNSEEN, dtype=torch.float16):
        assert_near(run(x), layer(x), torch.float16)


@needs_onnx
@pytest.mark.parametrize(
    "case",
    [FULLY_ATTENTIONAL, CHANNEL, SPATIAL, SPATIAL_GAUSSIAN],
    ids=lambda case: case.name,
)
def test_onnx_keeps_float16_scores_in_float32(case: Case) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    layer = case.build(6, torch.float16).eval()
    # Unscaled scores of numbers of this size are far beyond the 65504 at which float16 ends.
    x, other = (1000 * each for each in images((2, 6, 8, 9), (3, 6, 7, 5), dtype=torch.float16))
    # Not onnxruntime, which computes float16 in float32 on a CPU and so hides an overflow.
    evaluator = ReferenceEvaluator(onnx.load_model_from_string(onnx_program(layer, x, 2)))
    (found,) = evaluator.run(None, {evaluator.input_names[0]: other.numpy()})
    assert_near(torch.as_tensor(found), layer(other), torch.float16)


def aot_inductor(model: nn.Module, x: Tensor, smallest: int, folder: Path) -> Any:
    """The model as an AOTInductor package with free batch, height and width, loaded again."""
    program = torch.export.export(model, (x,), dynamic_shapes=free_sizes(smallest), strict=True)
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(folder / "model.pt2")
    )
    return torch._inductor.aoti_load_package(package)


@needs_compiler
@pytest.mark.network
@pytest.mark.parametrize("case", [FULLY_ATTENTIONAL, CHANNEL, SPATIAL], ids=lambda case: case.name)
def test_an_aot_inductor_package_agrees_with_eager_at_unseen_sizes(
    case: Case, tmp_path: Path
) -> None:
    layer = case.build(6, torch.float32).eval().requires_grad_(False)
    run = aot_inductor(layer, *images((2, 6, 8, 9)), smallest_size(layer), tmp_path)
    for x in images(*UNSEEN):
        assert_near(run(x), layer(x), torch.float32)


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
