"""Every module of a layer, head or network is called: hooks, adapters, quantised ones count."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fullattn
from fullattn import FullyAttentional, SpatialNonLocal, functional
from fullattn.segmentation.models import FLANet, SegmentationHead, attentions
from helpers.cases import CASES, assert_near

pytestmark = pytest.mark.filterwarnings("ignore:mix_images=True:UserWarning")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    case.name: (lambda case=case: case.layer(8, **case.options)) for case in CASES
} | {
    "fully_attentional-projected": lambda: FullyAttentional(8, gamma_init=0.7),
    "fully_attentional-scaled": lambda: FullyAttentional(8, gamma_init=0.7, scale=None),
    "fully_attentional-mix_images": lambda: FullyAttentional(
        8, gamma_init=0.7, project=False, mix_images=True
    ),
    "spatial-normalised": lambda: SpatialNonLocal(8, zero_init=False),
    "concatenation-subsampled": lambda: SpatialNonLocal(
        8, mode="concatenation", subsample=2, zero_init=False
    ),
}


def inserted() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    fullattn.insert(model, FullyAttentional, after="0", gamma_init=0.7)
    fullattn.swap(
        model, "1", SpatialNonLocal, zero_init=False, sample_input=torch.zeros(2, 8, 6, 7)
    )
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    f"head-{name}": (lambda name=name: SegmentationHead(8, 3, attention=name, channels=8))
    for name in attentions()
} | {"inserted": inserted}
ALL = LAYERS | NETWORKS
each_module = pytest.mark.parametrize("name", ALL)


def image(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (2, 8, 6, 7), generator=generator, dtype=torch.float64)


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A module in which nothing is 0, so that every part of it counts."""
    torch.manual_seed(0)
    module = make().double().eval()
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, 0.3, 0.2)
    return module


def leaves(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: each
        for name, each in module.named_modules()
        if not any(each.children()) and not isinstance(each, fullattn.ChannelNonLocal)
    }


@each_module
def test_every_module_is_called_and_what_a_hook_returns_counts(name: str) -> None:
    module, x = build(ALL[name]), image()
    before = module(x)
    for part, leaf in leaves(module).items():
        calls = 0

        def alter(leaf: nn.Module, given: Any, result: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return result * torch.linspace(0.5, 2.0, result.shape[-1], dtype=result.dtype)

        handle = leaf.register_forward_hook(alter)
        after = module(x)
        handle.remove()
        assert calls == 1, part
        changes = (after - before).abs().max() > 1e-6 * before.abs().max()
        assert changes or isinstance(leaf, nn.Dropout2d), part


def test_every_module_of_a_network_is_called() -> None:
    pytest.importorskip("timm", reason="timm is not installed", exc_type=Exception)
    network = FLANet(3, "test_resnet", channels=8, out_channels=8)
    called: set[nn.Module] = set()
    for each in leaves(network).values():
        each.register_forward_hook(lambda module, given, result: called.add(module))
    network.train()(torch.randn(2, 3, 64, 64))
    backbone = set(network.backbone.modules())  # timm's own
    missed = [name for name, each in leaves(network).items() if each not in called | backbone]
    assert missed == []


class Adapted(nn.Module):
    """A module with another beside it, whose results add up: a LoRA adapter of full rank."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapter = copy.deepcopy(base)
        for parameter in self.adapter.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.adapter(x)


def weighted(module: nn.Module) -> dict[str, nn.Module]:
    return {
        name: leaf
        for name, leaf in leaves(module).items()
        if isinstance(leaf, (nn.Linear, nn.Conv2d))
    }


def put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Do what `nn.Module.set_submodule` does from PyTorch 2.5."""
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, part)


@each_module
def test_an_adapter_around_any_module_is_the_same_as_its_weights_added(name: str) -> None:
    module, x = build(ALL[name]), image()
    before = module(x)
    for part, leaf in weighted(module).items():
        adapted = Adapted(leaf)
        merged = copy.deepcopy(module)
        target: Any = merged.get_submodule(part)
        with torch.no_grad():
            for own, added in zip(target.parameters(), adapted.adapter.parameters(), strict=True):
                own += added
        put(module, part, adapted)
        y = module(x)
        put(module, part, leaf)
        assert (y - before).abs().max() > 1e-6 * before.abs().max(), part
        assert_near(y, merged(x), torch.float64, what=part)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("channel")])
def test_the_adapter_gets_a_gradient(name: str) -> None:
    module, x = build(ALL[name]), image()
    for part, leaf in weighted(module).items():
        put(module, part, Adapted(leaf))
    module.requires_grad_(False)
    adapters = {n: p for n, p in module.named_parameters() if ".adapter." in n}
    for parameter in adapters.values():
        parameter.requires_grad_()
    module(x).square().sum().backward()
    # Only the bias of a key may have none: it adds the same number to all scores of a query.
    missing = {n for n, p in adapters.items() if p.grad is None or not p.grad.any()}
    assert missing == set()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@each_module
def test_parametrised_weights_are_what_is_computed_with(name: str) -> None:
    module, x = build(ALL[name]), image()
    before = module(x)
    for part, leaf in weighted(module).items():
        doubled = copy.deepcopy(module)
        with torch.no_grad():
            doubled.get_submodule(part).weight.mul_(2)  # type: ignore[operator, union-attr]
        parametrize.register_parametrization(leaf, "weight", Doubled())
        y = module(x)
        parametrize.remove_parametrizations(leaf, "weight", leave_parametrized=False)
        assert (y - before).abs().max() > 1e-6 * before.abs().max(), part
        assert_near(y, doubled(x), torch.float64, what=part)


@pytest.fixture
def quantised() -> Iterator[Callable[[nn.Module], Any]]:
    """Dynamic quantisation of every Linear, on a machine that has an engine for it."""
    engines = [name for name in torch.backends.quantized.supported_engines if name != "none"]
    if not engines:
        pytest.skip("PyTorch has no engine for quantised Linears here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda module: torch.ao.quantization.quantize_dynamic(
            module, {nn.Linear}, dtype=torch.qint8
        )


@pytest.mark.parametrize("name", [name for name in ALL if "fully" in name or "concat" in name])
def test_dynamically_quantised_linears_are_the_ones_that_run(
    name: str, quantised: Callable[[nn.Module], Any]
) -> None:
    module, x = build(ALL[name]).float(), image().float()
    made = quantised(module)
    changed = [part for part, leaf in module.named_modules() if isinstance(leaf, nn.Linear)]
    assert changed
    for part in changed:
        assert type(made.get_submodule(part)).__module__.startswith("torch.ao"), part
    exact, y = module(x), made(x)
    assert not torch.equal(y, exact)
    assert (y - exact).abs().max() < 0.2 * exact.abs().max()


def test_a_quantised_key_is_the_key(quantised: Callable[[nn.Module], Any]) -> None:
    layer = quantised(FullyAttentional(8, project=False, gamma_init=0.7))
    x = image().float()
    column_key, row_key = layer.column_key(x.mean(3).mT).mT, layer.row_key(x.mean(2).mT).mT
    expected = functional.fully_attentional(x, column_key, row_key, layer.gamma)
    assert torch.equal(layer(x), expected)
    maps = layer.similarity(x)
    torch.testing.assert_close(maps.columns, functional.column_similarity(x, column_key))


@pytest.mark.parametrize("subsample", [1, 2])
def test_score_is_applied_to_the_concatenation_of_query_and_key(subsample: int) -> None:
    torch.manual_seed(0)
    layer = SpatialNonLocal(6, mode="concatenation", subsample=subsample).double()
    layer.score = nn.Linear(6, 1).double()  # with a bias, which counts once
    x = image(2, 6, 4, 5)
    query, key = layer.query(x), layer.key(x)
    key = nn.functional.max_pool2d(key, subsample).flatten(2).mT
    query = query.flatten(2).mT
    pairs = torch.cat(
        [
            query[:, :, None].expand(-1, -1, key.shape[1], -1),
            key[:, None].expand(-1, query.shape[1], -1, -1),
        ],
        dim=-1,
    )
    expected = torch.relu(layer.score(pairs)[..., 0]) / key.shape[1]
    assert_near(layer.similarity(x), expected, torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_similarity_calls_what_forward_calls_for_it(name: str) -> None:
    layer, x = build(LAYERS[name]), image()
    for part in ("column_key", "row_key", "query", "key", "score"):
        leaf = getattr(layer, part, None)
        if isinstance(leaf, nn.Module):
            calls: list[int] = []
            handle = leaf.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            layer.similarity(x)  # type: ignore[operator]
            handle.remove()
            assert calls == [1], part


class InEights(nn.Module):
    """A 1x1 convolution whose weight is kept in 8 bits, as quantising libraries do."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.scale = float(base.weight.detach().abs().max() / 127)
        kept = (base.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(kept, requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_a_value_whose_weight_is_an_integer_is_called() -> None:
    layer, x = build(lambda: SpatialNonLocal(8, zero_init=False)).float(), image().float()
    exact = layer(x)
    layer.value = InEights(layer.value)  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), exact, rtol=0.1, atol=0.1)
    with pytest.raises((TypeError, RuntimeError)):
        layer(x.double())
