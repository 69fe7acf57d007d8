"""What works with what: a check of every tool with every layer, and the page that tells of them.

`python tests/helpers/tools.py docs/tools.md` writes the page; tests/tools runs every check.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fullattn

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "FullyAttentional": partial(fullattn.FullyAttentional, gamma_init=0.7),
    "ChannelNonLocal": partial(fullattn.ChannelNonLocal, gamma_init=0.7),
    "SpatialNonLocal": partial(fullattn.SpatialNonLocal, zero_init=False),
}


@dataclass(frozen=True)
class Tool:
    """A tool, or one way to use it.

    Attributes:
        group: heading on the page.
        name: of the tool.
        check: takes the name of a layer; raises where the tool does not work with it.
        cells: by layer, what the page says in place of ✓.
        needs: packages that are skipped where absent.
        slow: whether it compiles.
    """

    group: str
    name: str
    check: Callable[[str], None]
    cells: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    slow: bool = False


TOOLS: list[Tool] = []


def tool(
    group: str,
    name: str,
    *,
    cells: dict[str, str] | None = None,
    needs: tuple[str, ...] = (),
    slow: bool = False,
) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Add a check to `TOOLS`."""

    def add(check: Callable[[str], None]) -> Callable[[str], None]:
        TOOLS.append(Tool(group, name, check, cells or {}, needs, slow))
        return check

    return add


def everywhere(text: str) -> dict[str, str]:
    """One cell for all layers."""
    return dict.fromkeys(LAYERS, text)


IMAGES = (2, 3, 9, 12)
UNSEEN = ((1, 3, 5, 7), (3, 3, 20, 11), (5, 3, 16, 8))


def network(name: str, seed: int = 0) -> nn.Sequential:
    """Convolution, layer, convolution; in evaluation mode."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), LAYERS[name](16), nn.Conv2d(16, 4, 1)
    ).eval()


def images(*shape: int, seed: int = 1) -> Tensor:
    """Draw a batch."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or IMAGES), generator=generator)


def small(name: str) -> tuple[nn.Module, Tensor]:
    """Build a layer of 4 channels in float64 with an input that can be differentiated."""
    torch.manual_seed(0)
    options = {"FullyAttentional": {"project": False}}.get(name, {})
    layer = LAYERS[name](4, **options).double().eval()
    return layer, (0.3 * torch.randn(2, 4, 3, 5, dtype=torch.float64)).requires_grad_()


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Fail unless the relative error is within the tolerance."""
    assert actual.shape == expected.shape
    error = (actual - expected).norm() / expected.norm()
    assert error <= tolerance, f"off by {error:.3g}"


# Derivatives


@tool("Derivatives", "second derivatives (`gradgradcheck`, every backend)")
def second(name: str) -> None:
    """Compare with finite differences in float64."""
    for backend in (None, "chunked", "sdpa", "reference"):
        layer, x = small(name)
        with fullattn.backend(backend):
            assert torch.autograd.gradgradcheck(layer, (x,))


@tool("Derivatives", "third derivatives")
def third(name: str) -> None:
    """Differentiate thrice, and compare with the definition's."""
    found = []
    for backend in (None, "reference"):
        layer, x = small(name)
        with fullattn.backend(backend):
            value = layer(x).pow(3).sum()
            for _ in range(2):
                value = torch.autograd.grad(value, x, create_graph=True)[0].pow(2).sum()
            found += torch.autograd.grad(value, x)
    near(*found, 1e-9)


@tool("Derivatives", "forward mode (`torch.func.jvp`, dual numbers)")
def forward_mode(name: str) -> None:
    """Compare with finite differences in float64."""
    layer, x = small(name)
    assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True, check_backward_ad=False)
    _, tangent = torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))
    step = 1e-6
    near(tangent, (layer(x + step) - layer(x - step)).detach() / (2 * step), 1e-6)


@tool("Derivatives", "`torch.func.hessian`, Hessian-vector products")
def hessian(name: str) -> None:
    """Compare a product with the whole matrix."""
    layer, x = small(name)
    x = x.detach()[:1, :, :2, :2]

    def loss(y: Tensor) -> Tensor:
        return layer(y).square().sum()

    vector = torch.ones_like(x)
    whole = torch.func.hessian(loss)(x).reshape(x.numel(), x.numel())
    _, product = torch.autograd.functional.hvp(loss, x, vector)
    near(product.flatten(), whole @ vector.flatten(), 1e-9)


@tool("Derivatives", "per-sample gradients (`vmap(grad(...))`)")
def per_sample(name: str) -> None:
    """Compare with a loop over the images."""
    layer, x = small(name)
    parameters = dict(layer.named_parameters())

    def loss(given: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(layer, given, (image.unsqueeze(0),)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach())
    for i, image in enumerate(x.detach()):
        grads = torch.autograd.grad(loss(parameters, image), tuple(parameters.values()))
        for key, expected in zip(parameters, grads, strict=True):
            torch.testing.assert_close(found[key][i], expected)


@tool("Derivatives", "`torch.func.vmap`, ensembles (`stack_module_state`)")
def ensemble(name: str) -> None:
    """Compare with a loop over the networks."""
    nets = [network(name, seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    found = torch.func.vmap(
        lambda p, b, x: torch.func.functional_call(base, (p, b), (x,)), (0, 0, None)
    )(parameters, buffers, images())
    for net, each in zip(nets, found, strict=True):
        near(each, net(images()))


@tool("Derivatives", "`jacrev`, `torch.autograd.functional.jacobian`")
def jacobian(name: str) -> None:
    """Compare the two."""
    layer, x = small(name)
    x = x.detach()[:1, :, :2, :3]
    near(torch.func.jacrev(layer)(x), torch.autograd.functional.jacobian(layer, x), 1e-9)


@tool("Derivatives", "`torch.autograd.set_detect_anomaly`")
def anomaly(name: str) -> None:
    """Run backward under it."""
    with torch.autograd.set_detect_anomaly(True):
        network(name)(images()).sum().backward()


# Programs


def own_operators(program: Any) -> list[str]:
    """List the operators of this package in a traced program."""
    return [n.kind() for n in program.inlined_graph.nodes() if n.kind().startswith("fullattn::")]


@tool("Programs", "`torch.jit.trace`, with its own check")
def traced(name: str) -> None:
    """Trace with and without gradients, and run at sizes never seen."""
    net = network(name)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            program = torch.jit.trace(net, images())
        assert not own_operators(program)
        with torch.no_grad():
            for shape in (IMAGES, *UNSEEN):
                near(program(images(*shape)), net(images(*shape)))


@tool("Programs", "the traced program without this package", slow=True)
def traced_elsewhere(name: str) -> None:
    """Load it in a process that cannot import fullattn."""
    net, x = network(name), images(*UNSEEN[1])
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, images()), file)
    code = (
        "import io, pickle, sys; sys.modules['fullattn'] = None; import torch\n"
        "program, x = pickle.load(sys.stdin.buffer)\n"
        "y = torch.jit.load(io.BytesIO(program))(x)\n"
        "sys.stdout.buffer.write(pickle.dumps(y.detach()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((file.getvalue(), x)),
        capture_output=True,
        check=True,
    )
    near(pickle.loads(done.stdout), net(x).detach())


@tool(
    "Programs",
    "`torch.jit.script`",
    cells=everywhere("refused, with a hint: use `torch.jit.trace`"),
)
def scripted(name: str) -> None:
    """Read the sentence."""
    with pytest.raises(RuntimeError, match=f"{name}: use torch.jit.trace") as refused:
        torch.jit.script(network(name))
    assert "\n" not in str(refused.value)


def check_onnx(name: str, **options: Any) -> None:
    """Export with free batch, height and width, and run in onnxruntime at three unseen sizes."""
    import onnxruntime

    net, file = network(name), io.BytesIO()
    torch.onnx.export(net, (images(),), file, input_names=["x"], output_names=["y"], **options)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in UNSEEN:
        x = images(*shape)
        (y,) = session.run(None, {"x": x.numpy()})
        near(torch.from_numpy(np.asarray(y)), net(x).detach())


@tool("Programs", "`torch.onnx.export(dynamo=False)`, opsets 14, 17, 20", needs=("onnxruntime",))
def onnx_traced(name: str) -> None:
    """Export three opsets."""
    axes = {0: "batch", 2: "height", 3: "width"}
    for opset in (14, 17, 20):
        check_onnx(name, dynamo=False, opset_version=opset, dynamic_axes={"x": axes, "y": axes})


@tool(
    "Programs", "`torch.onnx.export(dynamo=True)`", needs=("onnxruntime", "onnxscript"), slow=True
)
def onnx_exported(name: str) -> None:
    """Export the default opset."""
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    check_onnx(name, dynamo=True, dynamic_shapes=(free,), verbose=False)


@tool("Programs", "`torch.export`, strict, free sizes", slow=True)
def exported(name: str) -> None:
    """Run at sizes never seen."""
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    net = network(name)
    program = torch.export.export(net, (images(),), dynamic_shapes=(free,), strict=True).module()
    for shape in UNSEEN:
        near(program(images(*shape)), net(images(*shape)))


@tool("Programs", "`torch.compile(fullgraph=True)`", slow=True)
def compiled(name: str) -> None:
    """Compare results and gradients."""
    net = network(name)
    torch._dynamo.reset()
    program = torch.compile(net, fullgraph=True, backend="aot_eager")
    near(program(images()), net(images()))
    program(images()).sum().backward()


@tool("Programs", "`torch.fx.symbolic_trace`")
def symbolically_traced(name: str) -> None:
    """See the layer as one call, in a network and alone."""
    net = network(name)
    graph = torch.fx.symbolic_trace(net)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    near(graph(images()), net(images()))
    alone = torch.fx.symbolic_trace(net[1])
    x = images(2, 16, 5, 6)
    near(alone(x), net[1](x))


@tool("Programs", "torchvision's `create_feature_extractor`", needs=("torchvision",))
def feature_extractor(name: str) -> None:
    """Extract what the layer returns."""
    from torchvision.models.feature_extraction import create_feature_extractor

    net = network(name)
    features = create_feature_extractor(net, {"1": "attended"})(images())
    near(features["attended"], net[:2](images()))


@tool("Programs", "timm's feature extractor", needs=("timm",))
def timm_extractor(name: str) -> None:
    """Extract from a network that the layer was inserted into."""
    import timm
    from timm.models._features_fx import create_feature_extractor

    net = timm.create_model("resnet18").eval()
    options = {"project": False} if name == "FullyAttentional" else {}
    layer = getattr(fullattn, name)
    fullattn.insert(net, layer, after="layer2", sample_input=images(1, 3, 64, 64), **options)
    found = create_feature_extractor(net, ["layer2", "layer3"])(images(1, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in found.values()] == [(128, 8, 8), (256, 4, 4)]


@tool("Programs", "`make_fx`")
def make_fx(name: str) -> None:
    """Run the graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    net = network(name)
    near(make_fx(net)(images())(images()), net(images()))


@tool("Programs", "`torch.func.functionalize`")
def functionalize(name: str) -> None:
    """Compare results."""
    net = network(name)
    near(torch.func.functionalize(net)(images()), net(images()))


@tool("Programs", "meta device, `FakeTensorMode`")
def without_data(name: str) -> None:
    """Run forward and backward on shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = network(name)(torch.randn(IMAGES))
        y.sum().backward()
    assert y.shape == (2, 4, 9, 12)
    y = network(name).to("meta")(images().to("meta"))
    y.sum().backward()
    assert y.shape == (2, 4, 9, 12)


# Adapters, quantisation, parametrisation


@tool("Adapters and quantisation", "peft LoRA on every Linear and convolution", needs=("peft",))
def lora(name: str) -> None:
    """Train the adapters, then merge them."""
    from peft import LoraConfig, get_peft_model

    net = network(name)
    targets = [key for key, each in net.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    model = get_peft_model(net, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1e-5)
    before = model(images())
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in trained)
        optimizer.step()
    after = model(images()).detach()
    assert not torch.equal(before, after)
    near(model.merge_and_unload()(images()), after)


def check_torchao(name: str, configuration: str) -> None:
    """Quantise a network whose result stays within 5 %."""
    from torchao import quantization

    net = network(name)
    expected = net(images())
    quantization.quantize_(net, getattr(quantization, configuration)())
    near(net(images()), expected, 0.05)


@tool("Adapters and quantisation", "torchao int8, weights alone", needs=("torchao",))
def int8_weights(name: str) -> None:
    """Quantise the Linears."""
    check_torchao(name, "Int8WeightOnlyConfig")


@tool("Adapters and quantisation", "torchao int8, dynamic", needs=("torchao",))
def int8_dynamic(name: str) -> None:
    """Quantise the Linears and what they read."""
    check_torchao(name, "Int8DynamicActivationInt8WeightConfig")


@tool("Adapters and quantisation", "PT2E export quantisation (X86)", needs=("torchao",), slow=True)
def pt2e(name: str) -> None:
    """Quantise an exported network."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    net = network(name)
    expected = net(images())
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(net, (images(),)).module(), quantizer)
    prepared(images())
    near(convert_pt2e(prepared)(images()), expected, 0.1)


@tool("Adapters and quantisation", "`torch.ao.quantization.quantize_dynamic`")
def eager_dynamic(name: str) -> None:
    """Quantise the Linears."""
    net = network(name)
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    near(quantised(images()), net(images()), 0.05)


def check_parametrised(name: str, change: Callable[[nn.Module], object]) -> None:
    """Change every Linear and convolution, and run forward and backward three times."""
    net = network(name).train()
    for module in list(net.modules()):
        if isinstance(module, nn.Linear | nn.Conv2d):
            change(module)
    for _ in range(3):
        net.zero_grad()
        net(images()).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


@tool("Adapters and quantisation", "`torch.nn.utils.prune`")
def pruned(name: str) -> None:
    """Prune a third of the weights, and make it permanent."""
    from torch.nn.utils import prune

    check_parametrised(name, lambda module: prune.l1_unstructured(module, "weight", 0.3))


@tool("Adapters and quantisation", "`weight_norm`, old and parametrised")
def weight_norm(name: str) -> None:
    """Normalise every weight."""
    check_parametrised(name, nn.utils.parametrizations.weight_norm)
    check_parametrised(name, nn.utils.weight_norm)


@tool("Adapters and quantisation", "`spectral_norm`, old and parametrised; `orthogonal`")
def spectral_norm(name: str) -> None:
    """Normalise every weight."""
    check_parametrised(name, nn.utils.parametrizations.spectral_norm)
    check_parametrised(name, nn.utils.spectral_norm)
    check_parametrised(name, nn.utils.parametrizations.orthogonal)


@tool("Adapters and quantisation", "folding of normalisations into convolutions")
def folded(name: str) -> None:
    """Fold beside the layer with fx, and inside it by hand."""
    from torch.fx.experimental.optimization import fuse
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    net = network(name)
    net = nn.Sequential(net[0], nn.BatchNorm2d(16), net[1], net[2]).eval()
    net[1].running_mean.uniform_()
    near(fuse(net)(images()), net(images()))
    end = getattr(net[2], "project", None)
    if end is not None:
        expected = net(images())
        end.conv, end.norm = fuse_conv_bn_eval(end.conv, end.norm), nn.Identity()
        near(net(images()), expected)


@tool("Adapters and quantisation", "hooks of every kind, on the layer and inside it")
def hooks(name: str) -> None:
    """Count what runs."""
    net, seen = network(name), set()
    for path, module in net[1].named_modules():
        for register in (
            module.register_forward_pre_hook,
            module.register_forward_hook,
            module.register_full_backward_pre_hook,
            module.register_full_backward_hook,
        ):
            register(lambda *_, key=(path, register.__name__): seen.add(key))
    net(images()).sum().backward()
    run = [path for path, module in net[1].named_modules() if path == "" or "." not in path]
    assert len({path for path, _ in seen} & set(run)) == len(run)
    assert {hook for path, hook in seen if not path} == {hook for _, hook in seen}


# Training


@tool("Training", "activation checkpointing, reentrant and not")
def checkpointed(name: str) -> None:
    """Compare gradients."""
    from torch.utils.checkpoint import checkpoint

    net, found = network(name), []
    for run in (
        net,
        lambda x: checkpoint(net, x, use_reentrant=True),
        lambda x: checkpoint(net, x, use_reentrant=False),
    ):
        x = images().requires_grad_()
        run(x).square().sum().backward()
        found.append(x.grad)
    near(found[1], found[0])
    near(found[2], found[0])


@tool("Training", "`save_on_cpu`, `saved_tensors_hooks`")
def saved_hooks(name: str) -> None:
    """Compare gradients."""
    net, found = network(name), []
    for context in (
        contextlib.nullcontext(),
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().copy(), torch.from_numpy),
    ):
        x = images().requires_grad_()
        with context:
            net(x).square().sum().backward()
        found.append(x.grad)
    near(found[1], found[0])
    near(found[2], found[0])


@tool("Training", "replicas of `DataParallel`, in threads")
def replicas(name: str) -> None:
    """Run replicas, whose parameters are plain tensors, in two threads."""
    net, results = network(name), {}

    def replica(module: nn.Module) -> nn.Module:
        copied = module._replicate_for_data_parallel()
        for key, child in module._modules.items():
            copied._modules[key] = None if child is None else replica(child)
        for key, parameter in module._parameters.items():
            if parameter is None:
                copied._parameters[key] = None
            else:
                setattr(copied, key, parameter.detach() * 1)
        return copied

    def run(i: int, module: nn.Module) -> None:
        results[i] = module(images())

    threads = [threading.Thread(target=run, args=(i, replica(net))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        near(results[i], net(images()))


@tool("Training", "`torch.save` of the whole module, pickle, deepcopy")
def saved(name: str) -> None:
    """Compare results."""
    net, file = network(name), io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(net)),
        copy.deepcopy(net),
    ):
        assert torch.equal(other(images()), net(images()))


@tool("Training", "`torch.use_deterministic_algorithms`")
def deterministic(name: str) -> None:
    """Compare two runs."""
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            net = network(name)
            net(images()).square().sum().backward()
            found.append([p.grad for p in net.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *found))


@tool("Training", "`torch.autocast`")
def autocast(name: str) -> None:
    """Run forward and backward in bfloat16."""
    net = network(name)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(images())
    y.float().sum().backward()
    near(y.float(), net(images()), 0.05)


@tool("Training", "`AveragedModel` (EMA, SWA)")
def averaged(name: str) -> None:
    """Average once."""
    net = network(name)
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    near(average(images()), net(images()))


@tool("Training", "`torch.inference_mode`")
def inference_mode(name: str) -> None:
    """Compare results."""
    net = network(name)
    with torch.inference_mode():
        y = net(images())
    near(y.clone(), net(images()).detach())


# Counters of FLOPs


def true_macs(name: str) -> tuple[nn.Module, Tensor, float]:
    """Return a network, its input, and its multiply-accumulates by PyTorch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    net, x = network(name), images(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    expected = 2 * 1024 * 16 * (3 * 9 + 4) + fullattn.costs.cost(net[1], (1, 16, 32, 32)).flops
    assert counter.get_total_flops() == expected
    return net, x, expected / 2


def check_count(name: str, count: Callable[[nn.Module, Tensor], float]) -> None:
    """Count within 2 %: some counters add biases, normalisations and activations."""
    net, x, expected = true_macs(name)
    fullattn.costs.register_counters()
    with contextlib.redirect_stdout(io.StringIO()):
        found = count(net, x)
    assert abs(found / expected - 1) < 0.02, (found, expected)


@tool("Counters (after `costs.register_counters()`)", "`FlopCounterMode` (FLOPs)")
def flop_counter(name: str) -> None:
    """Compare with the formula."""
    true_macs(name)


@tool("Counters (after `costs.register_counters()`)", "ultralytics-thop (MACs)", needs=("thop",))
def thop(name: str) -> None:
    """Count a network, and a layer alone."""
    import thop

    check_count(name, lambda net, x: thop.profile(net, (x,), verbose=False)[0])
    layer, x = network(name)[1], images(1, 16, 32, 32)
    macs, _ = thop.profile(layer, (x,), verbose=False)
    assert macs == fullattn.costs.cost(layer, x.shape).flops / 2


@tool(
    "Counters (after `costs.register_counters()`)",
    "ptflops, both backends (MACs)",
    needs=("ptflops",),
)
def ptflops(name: str) -> None:
    """Count by modules and by operators."""
    from ptflops import get_model_complexity_info

    for backend in ("pytorch", "aten"):

        def count(net: nn.Module, x: Tensor, backend: str = backend) -> float:
            found, _ = get_model_complexity_info(
                net,
                tuple(x.shape[1:]),
                as_strings=False,
                print_per_layer_stat=False,
                backend=backend,
                input_constructor=lambda _: {"input": x},
            )
            return float(found)

        check_count(name, count)


@tool("Counters (after `costs.register_counters()`)", "fvcore (MACs)", needs=("fvcore",))
def fvcore(name: str) -> None:
    """Count operators of a trace."""
    from fvcore.nn import FlopCountAnalysis

    check_count(name, lambda net, x: FlopCountAnalysis(net, x).total())


@tool("Counters (after `costs.register_counters()`)", "mmengine (MACs)", needs=("mmengine",))
def mmengine(name: str) -> None:
    """Count operators of a trace."""
    from mmengine.analysis import FlopAnalyzer

    check_count(name, lambda net, x: FlopAnalyzer(net, x).total())


@tool("Counters (after `costs.register_counters()`)", "calflops (MACs)", needs=("calflops",))
def calflops(name: str) -> None:
    """Count modules and functionals."""
    from calflops import calculate_flops

    def count(net: nn.Module, x: Tensor) -> float:
        _, macs, _ = calculate_flops(
            net, input_shape=tuple(x.shape), output_as_string=False, print_results=False
        )
        return float(macs)

    check_count(name, count)


TORCHINFO = {"FullyAttentional": 0.73, "ChannelNonLocal": 0.51, "SpatialNonLocal": 0.06}


@tool(
    "Counters (after `costs.register_counters()`)",
    "torchinfo (MACs), which cannot be taught",
    needs=("torchinfo",),
    cells={
        name: f"counts weights alone: {part:.0%} of the network" for name, part in TORCHINFO.items()
    },
)
def torchinfo(name: str) -> None:
    """Measure what it leaves out."""
    import torchinfo

    net, x, expected = true_macs(name)
    found = torchinfo.summary(net, input_data=x, verbose=0).total_mult_adds
    assert abs(found / expected - TORCHINFO[name]) < 0.01, found / expected


HEAD = """# What works with what

Written by `make tables` from the checks in `tests/helpers/tools.py`; `make test` runs every cell,
with PyTorch 2.13 on a CPU. ✓ means that results or gradients were compared, in a network of a
convolution, the layer and a convolution. deepspeed's profiler and CUDA graphs, which need a GPU,
were not tried.

The layers choose by themselves what each tool needs. While a program is traced or exported they
run PyTorch's own operators alone, so the program loads where this package is not installed.
Derivatives beyond the first, torch.func transforms and forward-mode differentiation go through the
definition of the layer: they give the same numbers, but build the similarity maps, and take their
time and memory (see the [cost explorer](costs.md), backend `reference`).

`fullattn.costs.register_counters()` teaches the FLOP counters that are installed; without it, they
count too little. A multiply-accumulate (MAC) is 2 FLOPs.
"""


def page() -> str:
    """Write the page."""
    parts = [HEAD]
    for group in dict.fromkeys(each.group for each in TOOLS):
        rows = [f"## {group}", "", f"| | {' | '.join(f'`{name}`' for name in LAYERS)} |"]
        rows.append("| --- |" + " :-: |" * len(LAYERS))
        for each in TOOLS:
            if each.group == group:
                cells = " | ".join(each.cells.get(name, "✓") for name in LAYERS)
                rows.append(f"| {each.name} | {cells} |")
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
