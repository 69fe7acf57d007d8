"""swap, insert and remove: changes, unchanged results, reports and errors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fullattn
from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal, costs, insert, remove, swap
from fullattn._versions import VERSION
from fullattn.layers import LAYERS as NAMED

LAYERS = (FullyAttentional, ChannelNonLocal, SpatialNonLocal)
IDENTITY: dict[type[nn.Module], dict[str, Any]] = {
    FullyAttentional: {"project": False},
    ChannelNonLocal: {},
    SpatialNonLocal: {},
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


class Pyramid(nn.Module):
    """A context module of a segmentation head, with parallel branches."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Conv2d(channels, out, 1), nn.Conv2d(channels, out, 3, padding=2, dilation=2)]
        )
        self.join = nn.Conv2d(2 * out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([branch(x) for branch in self.branches], 1))


class Skip(nn.Module):
    """A decoder block with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16 + 8, 8, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([x, skip], 1))


class Net(nn.Module):
    """A small segmentation network with the difficulties of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.act = nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.context = Pyramid(16, 16)
        self.reduce = Pyramid(16, 8)
        self.skip = Skip()
        shared = nn.Conv2d(8, 8, 1)
        self.first, self.second = shared, shared
        self.steps = [nn.Conv2d(8, 8, 3, padding=1)]
        self.add_module("step0", self.steps[0])
        self.head = nn.Conv2d(8, 5, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.auxiliary = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.act(self.stem(x))
        deep = self.context(self.body(low))
        y = self.reduce(deep) + self.skip(deep, low)
        y = self.second(self.first(y))
        for step in self.steps:
            y = step(y)
        result = {"out": self.head(y)}
        if self.training:
            result["aux"] = self.auxiliary(deep)
        return result


X = torch.zeros(2, 3, 12, 20)


def net(**options: Any) -> Net:
    torch.manual_seed(0)
    model = Net().to(**options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def image(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(seed)).to(dtype)


def snapshot(model: nn.Module) -> list[Any]:
    """Return the state that a failed or undone change must not alter."""
    return [
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(x), x._version) for name, x in model.state_dict(keep_vars=True).items()],
        [(name, x.clone()) for name, x in model.state_dict().items()],
        torch.get_rng_state(),
    ]


def same(one: list[Any], two: list[Any]) -> bool:
    return (
        one[:2] == two[:2]
        and all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one[2], two[2], strict=True))
        and torch.equal(one[3], two[3])
    )


# Replacement


@each_layer
def test_swap_replaces_the_module_by_the_layer(layer: Any) -> None:
    model = net()
    old = model.context
    report = swap(model, "context", layer)
    assert type(model.context) is layer
    assert model.context.channels == 16
    (change,) = report.changes
    assert (change.name, change.old, change.new, change.layer) == (
        "context",
        old,
        model.context,
        model.context,
    )
    assert (change.in_channels, change.out_channels, change.adapter) == (16, 16, None)
    assert model(image())["out"].shape == (2, 5, 6, 10)


@pytest.mark.parametrize("sample", [None, X], ids=["alone", "traced"])
def test_a_convolution_adapts_the_channels_and_is_reported(sample: Any) -> None:
    model = net()
    report = swap(model, "reduce", FullyAttentional, sample_input=sample, gamma_init=0.3)
    (change,) = report.changes
    assert (change.in_channels, change.out_channels) == (16, 8)
    assert change.adapter.weight.shape == (8, 16, 1, 1)
    assert change.layer.channels == 8
    assert "1×1 convolution from 16 to 8 channels" in str(report)
    x = torch.randn(2, 16, 6, 10)
    assert torch.equal(model.reduce(x), change.layer(change.adapter(x)))


def test_options_and_callables_reach_the_layer() -> None:
    model = net()
    swap(model, "context", SpatialNonLocal, inner_channels=3, mode="dot_product")
    assert (model.context.inner_channels, model.context.mode) == (3, "dot_product")
    swap(model, "reduce", lambda channels: FullyAttentional(channels, project=False))
    assert model.reduce.layer.project is None
    swap(model, "first", partial(FullyAttentional, scale=None), project=False)
    assert model.first.scale is None


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("context", ["context"]),
        ("context.branches.1", ["context.branches.1"]),
        ("*.branches.0", ["context.branches.0", "reduce.branches.0"]),
        ("context.*", ["context.branches.0", "context.branches.1", "context.join"]),
        ("re*e", ["reduce"]),
        ("step[0-9]", ["step0"]),
        (Pyramid, ["context", "reduce"]),
        (nn.BatchNorm2d, ["stem.1", "body.1"]),
        (
            lambda name, module: isinstance(module, nn.Conv2d) and "join" in name,
            ["context.join", "reduce.join"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_target_is_a_name_a_glob_a_class_or_a_predicate(target: Any, expected: list[str]) -> None:
    model = net()
    if target == "context.*":  # a ModuleList is not called and cannot be replaced

        def target(name: str, module: nn.Module) -> bool:
            return name.startswith("context.") and not isinstance(module, nn.ModuleList)

    report = swap(model, target, ChannelNonLocal)
    assert [change.name for change in report.changes] == expected
    for name in expected:
        assert any(isinstance(m, ChannelNonLocal) for m in model.get_submodule(name).modules())
    assert model(image())["out"].isfinite().all()


def test_of_nested_matches_the_outermost_is_replaced() -> None:
    model = net()
    report = swap(model, "context*", ChannelNonLocal)
    assert [change.name for change in report.changes] == ["context"]


def test_a_shared_module_stays_shared() -> None:
    model = net()
    report = swap(model, "second", ChannelNonLocal)
    assert model.first is model.second
    assert report.changes[0].names == ("first", "second")
    assert "also second" in str(report)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    remove(report)
    assert model.first is model.second
    assert isinstance(model.first, nn.Conv2d)


def test_references_in_a_plain_list_are_replaced() -> None:
    model = net()
    old = model.step0
    report = swap(model, "step0", ChannelNonLocal, gamma_init=1.0)
    assert model.steps[0] is model.step0
    assert isinstance(model.step0, ChannelNonLocal)
    remove(report)
    assert model.steps[0] is model.step0 is old


def test_a_module_that_only_training_calls_can_be_replaced() -> None:
    model = net()
    report = insert(model, ChannelNonLocal, after="auxiliary", sample_input=X)
    assert report.changes[0].in_channels == 5


# Inherited properties


@pytest.mark.parametrize("target", ["context", "act", "reduce"])
@each_layer
def test_device_dtype_mode_and_memory_format_are_inherited(layer: Any, target: str) -> None:
    model = net(dtype=torch.float64, memory_format=torch.channels_last)
    getattr(model, target).train()
    sample = X.double()
    if target == "act":
        report = insert(model, layer, after=target, sample_input=sample)
    else:
        report = swap(model, target, layer, sample_input=sample)
    change = report.changes[0]
    assert change.layer.training
    assert change.new.training
    for name, parameter in change.new.named_parameters():
        assert parameter.dtype == torch.float64, name
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
    meta = net().to("meta")
    report = insert(meta, layer, after=target, sample_input=X)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_a_model_on_meta_can_be_changed_and_then_materialised() -> None:
    with torch.device("meta"):
        model = Net()
    swap(model, "context", FullyAttentional, project=False)
    insert(model, ChannelNonLocal, after="body", sample_input=X)
    model.to_empty(device="cpu")
    reference = net()
    swap(reference, "context", FullyAttentional, project=False)
    insert(reference, ChannelNonLocal, after="body")
    model.load_state_dict(reference.state_dict())
    assert torch.equal(model.eval()(image())["out"], reference(image())["out"])


# Unchanged results and undoing


@each_layer
@pytest.mark.parametrize("after", ["body", "context", "first", "act", "skip"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_results_are_bit_identical_after_insertion(layer: Any, after: str, training: bool) -> None:
    model, twin = net().train(training), net().train(training)
    insert(model, layer, after=after, sample_input=X, **IDENTITY[layer])
    for seed in (0, 1):  # in training, batch normalisations move in both
        result, expected = model(image(seed)), twin(image(seed))
        assert result.keys() == expected.keys()
        for key in expected:
            assert torch.equal(result[key], expected[key])


@given(
    channels=st.sampled_from([1, 2, 5, 8]),
    size=st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([1, 2, 7])),
    layer=st.sampled_from(LAYERS),
)
def test_insertion_is_exact_for_any_shape(
    channels: int, size: tuple[int, int], layer: type[nn.Module]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.Tanh())
    x = torch.randn(2, 3, *size)
    before = model(x)
    report = insert(model, layer, after="1", sample_input=x, **IDENTITY[layer])
    assert torch.equal(model(x), before)
    assert report.changes[0].input == (2, channels, *size)


@pytest.mark.parametrize("after", ["context", "body", nn.BatchNorm2d, "*"])
def test_remove_undoes_an_insertion(after: Any) -> None:
    model = net()
    if after == "*":

        def after(name: str, module: nn.Module) -> bool:
            return name in ("context", "context.join", "context.branches.0")

    before = snapshot(model)
    report = insert(model, FullyAttentional, after=after)
    assert not same(snapshot(model), before)
    remove(report)
    before[3] = torch.get_rng_state()
    assert same(snapshot(model), before)
    assert report.removed
    assert "removed" in str(report)


def test_remove_moves_the_old_module_to_the_models_dtype_and_mode() -> None:
    model = net()
    old = model.context
    report = swap(model, "context", FullyAttentional)
    model.double().train()
    remove(report)
    assert model.context is old
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert old.training
    assert model(image(dtype=torch.float64))["out"].isfinite().all()


def test_replacements_are_undone_in_reverse_order() -> None:
    model = net()
    before = model(image())["out"]
    first = swap(model, "context", ChannelNonLocal, gamma_init=0.5)
    second = swap(model, "context", FullyAttentional)
    with pytest.raises(
        ValueError, match="ChannelNonLocal at 'context', got FullyAttentional; remove later"
    ):
        remove(first)
    remove(second)
    remove(first)
    assert torch.equal(model(image())["out"], before)
    with pytest.raises(ValueError, match="has been removed already"):
        remove(first)
    with pytest.raises(TypeError, match="expected the report of swap or insert, got str"):
        remove("context")  # type: ignore[arg-type]


@pytest.mark.parametrize("after", ["context", "body"])
def test_insertions_at_one_module_follow_each_other_and_are_undone_in_any_order(after: str) -> None:
    model = net()
    before = snapshot(model)
    kinds = (ChannelNonLocal, FullyAttentional, ChannelNonLocal)
    reports = [insert(model, kind, after=after, gamma_init=0.5) for kind in kinds]
    names = [report.changes[0].layer_name for report in reports]
    assert names == [
        f"{after}.channel_non_local",
        f"{after}.fully_attentional",
        f"{after}.channel_non_local_2",
    ]
    called: list[nn.Module] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, args, y: called.append(m))
    model(image())
    assert called == [report.layers[0] for report in reports]
    for report in (reports[1], reports[0], reports[2]):
        remove(report)
    before[3] = torch.get_rng_state()
    assert same(snapshot(model), before)
    assert not model.context._forward_hooks


def test_an_insertion_that_something_else_took_away_is_an_error() -> None:
    model = net()
    report = insert(model, ChannelNonLocal, after="context")
    del model.context.channel_non_local
    with pytest.raises(
        ValueError, match=r"ChannelNonLocal is no longer at 'context\.channel_non_local'"
    ):
        remove(report)
    with pytest.raises(AttributeError, match="channel_non_local"):  # not silently without the layer
        model(image())


class Iterates(nn.Module):
    """Calls its children itself, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class Adds(Iterates):
    def forward(self, x: Tensor) -> Tensor:
        return x + sum(child(x) for child in self.children())


class Pools(nn.Sequential):
    """As torchvision's ASPPPooling."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for module in self:
            x = module(x)
        return nn.functional.interpolate(x, size=size)


class Dense(nn.ModuleDict):
    """As DenseNet's block, whose layers take a list."""

    def __init__(self) -> None:
        super().__init__({"one": self.Layer(8, 4), "two": self.Layer(12, 4)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    class Layer(nn.Module):
        def __init__(self, channels: int, out: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, out, 1)

        def forward(self, features: list[Tensor]) -> Tensor:
            return self.conv(torch.cat(features, 1))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Iterates, "block.channel_non_local"),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()), "block.channel_non_local"),
        (lambda: nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1))), "block.channel_non_local"),
        (lambda: nn.Conv2d(8, 8, 1), "block.channel_non_local"),
        (Adds, "block.second.channel_non_local"),
        (lambda: Pools(nn.Conv2d(8, 8, 1), nn.ReLU()), "block.1.channel_non_local"),
        (lambda: Pools(nn.Sequential(nn.Conv2d(8, 8, 1))), "block.0.0.channel_non_local"),
        (Dense, "block.two.channel_non_local"),
    ],
    ids=[
        *("iterates", "sequential", "nested", "convolution"),
        *("adds", "pools", "pools nested", "dense"),
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["sample", "alone"])
def test_an_inserted_layer_is_called_once_and_last_wherever_it_lives(
    module: Callable[[], nn.Module], name: str, given: bool
) -> None:
    model = nn.Sequential()
    model.add_module("block", module())
    model.add_module("after", nn.Tanh())
    x = torch.randn(2, 8, 6, 5)
    before = model.block(x)
    names = [*dict(model.named_modules()), name]
    report = insert(
        model, ChannelNonLocal, after="block", gamma_init=0.5, sample_input=x if given else None
    )
    assert report.changes[0].layer_name == name
    assert {n for n in dict(model.named_modules()) if not n.startswith(f"{name}.")} == set(names)
    called: list[Any] = []
    report.layers[0].register_forward_hook(lambda m, args, y: called.append(args[0]))
    y = model(x)
    assert [torch.equal(taken, before) for taken in called] == [True]
    assert torch.equal(y, report.layers[0](before).tanh())
    remove(report)
    assert torch.equal(model(x), before.tanh())


def test_inferring_shapes_does_not_change_the_model() -> None:
    model = net().train()  # batch normalisations that count
    model.body[1].eval()
    model.cache = {}  # type: ignore[assignment]
    model.register_forward_hook(lambda module, args, result: module.cache.update(result))
    before = snapshot(model)
    with pytest.raises(ValueError, match="changes the size"):
        swap(model, "stem", FullyAttentional, sample_input=X)
    assert same(snapshot(model), before)
    assert model.cache == {}


# A changed model


def changed() -> tuple[Net, list[fullattn.swap.Report]]:
    model = net()
    reports = [
        swap(model, "reduce", FullyAttentional, gamma_init=0.5),
        insert(model, SpatialNonLocal, after="context", zero_init=False),
        insert(model, ChannelNonLocal, after="body", gamma_init=0.5),
    ]
    return model, reports


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("twin", [copy.deepcopy, through_pickle, through_torch_save])
def test_pickle_and_deepcopy_keep_model_and_report_together(twin: Callable[[Any], Any]) -> None:
    model, reports = changed()
    other, others = twin((model, reports))
    assert torch.equal(other(image())["out"], model(image())["out"])
    for report in reversed(others):
        remove(report)
    assert isinstance(other.reduce, Pyramid)
    assert isinstance(model.reduce, nn.Sequential)
    assert torch.equal(other(image())["out"], net()(image())["out"])


def test_weights_saved_before_the_insertion_load() -> None:
    model = net()
    insert(model, FullyAttentional, after="context", project=False)
    insert(model, ChannelNonLocal, after="body.0")
    torch.manual_seed(1)
    trained = Net().eval()
    result = model.load_state_dict(trained.state_dict(), strict=False)
    assert not result.unexpected_keys
    added = ("context.fully_attentional.", "body.0.channel_non_local.")
    assert sorted(result.missing_keys) == sorted(
        n for n in model.state_dict() if n.startswith(added)
    )
    names = [name for name, _ in model.named_parameters() if not name.startswith(added)]
    assert names == [name for name, _ in trained.named_parameters()]
    assert torch.equal(model(image())["out"], trained(image())["out"])
    own = model.state_dict()
    assert model.load_state_dict(own, strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*context.fully_attentional.gamma"):
        model.load_state_dict(trained.state_dict(), strict=True)


def test_the_module_before_an_inserted_layer_stays_in_its_place() -> None:
    model = net()
    modules = {name: id(module) for name, module in model.named_modules()}
    insert(model, ChannelNonLocal, after="first")
    insert(model, ChannelNonLocal, after="context")
    assert modules.items() <= {name: id(m) for name, m in model.named_modules()}.items()
    assert isinstance(model.first, nn.Conv2d)


def test_a_replica_of_a_changed_model_calls_its_own_layer() -> None:
    model = net()
    report = insert(model, ChannelNonLocal, after="context", gamma_init=0.5)
    replica = copy.copy(model.context)  # as torch.nn.parallel.replicate does
    replica._modules = dict(model.context._modules, channel_non_local=nn.Identity())
    x = torch.randn(1, 16, 4, 5)
    assert torch.equal(report.layers[0](replica(x)), model.context(x))


@pytest.mark.slow
def test_a_changed_model_compiles_and_exports() -> None:
    model, _ = changed()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image())["out"], model(image())["out"])
    torch._dynamo.reset()
    if VERSION < (2, 6):
        pytest.skip("PyTorch before 2.6 does not take sizes that are twice a free one")
    dims = {0: torch.export.Dim("batch"), 2: 2 * torch.export.Dim("h", min=2)}
    program = torch.export.export(model, (X,), dynamic_shapes=(dims,), strict=True)
    x = torch.randn(3, 3, 18, 20)
    torch.testing.assert_close(program.module()(x)["out"], model(x)["out"])
    torch._dynamo.reset()


# The report


def test_the_report_counts_parameters_and_flops() -> None:
    model = net()
    before = sum(p.numel() for p in model.parameters())
    report = swap(model, "reduce", FullyAttentional, sample_input=X)
    (change,) = report.changes
    assert change.input == (2, 16, 6, 10)
    pixels = 2 * 6 * 10
    pyramid = 2 * pixels * (16 * 8 + 16 * 8 * 9 + 16 * 8)
    assert change.flops_before == pyramid
    cost = costs.cost(change.layer, (2, 8, 6, 10))
    assert change.flops_after == cost.flops + 2 * pixels * 16 * 8
    assert change.parameters_after == cost.parameters + 16 * 8 + 8
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.layers == (change.layer,)


def test_the_report_of_an_insertion_counts_only_the_layer() -> None:
    model = net()
    report = insert(model, FullyAttentional, after="skip", sample_input=X)
    (change,) = report.changes
    cost = costs.cost(change.layer, (2, 8, 6, 10))
    assert (change.parameters_before, change.parameters_after) == (0, cost.parameters)
    assert (change.flops_before, change.flops_after) == (0, cost.flops)


def test_the_flops_of_a_report_are_the_sum_over_its_changes() -> None:
    report = swap(net(), Pyramid, FullyAttentional, sample_input=X)
    one, two = report.changes
    assert report.flops_before == one.flops_before + two.flops_before > 0
    assert report.flops_after == one.flops_after + two.flops_after > 0


def test_the_report_prints_as_a_table() -> None:
    model = net()
    model.context.join.register_forward_hook(print)
    lines = str(swap(model, Pyramid, FullyAttentional, sample_input=X)).splitlines()
    assert lines[0].split() == ["old", "new", "channels", "parameters", "FLOPs", "at"]
    assert lines[2].startswith("context")
    assert lines[3].startswith("reduce")
    assert "16 → 8" in lines[3]
    assert lines[4].startswith("the model")
    assert "context: no longer called: forward_hook print of context.join" in lines
    assert max(map(len, lines)) <= 100


# Errors, after which the model is unchanged


class Shrinks(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Breaks(Shrinks):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("does not work")


def second_fails() -> Callable[[int], nn.Module]:
    built: list[int] = []

    def build(channels: int) -> nn.Module:
        built.append(channels)
        if len(built) == 2:
            raise RuntimeError("the second one")
        return ChannelNonLocal(channels)

    return build


@dataclass(frozen=True)
class Refused:
    """A swap that fails with an error, and a pattern of its message."""

    target: Any
    message: str
    replacement: Any = FullyAttentional
    error: type[Exception] = ValueError
    options: dict[str, Any] = field(default_factory=dict)


REFUSED = {
    "no such name": Refused(
        "contxt", "no module matches the name 'contxt'; did you mean 'context'"
    ),
    "nothing close": Refused("zzz", "the name 'zzz'; known are stem, act, body"),
    "last part": Refused("decoder.join", "did you mean 'context.join'"),
    "glob": Refused("decoder.*.aspp", r"no module matches the glob 'decoder\.\*\.aspp'"),
    "class": Refused(nn.ConvTranspose2d, "is a ConvTranspose2d; known are BatchNorm2d, Conv2d"),
    "predicate": Refused(
        lambda name, module: False, r"no module of the \d+ in Net satisfies the predicate"
    ),
    "root by name": Refused("", "the target is the model itself"),
    "root by class": Refused(Net, r"the model itself \(Net\)"),
    "target a number": Refused(3, "expected a target .* got int", error=TypeError),
    "target a module": Refused(nn.ReLU(), "expected a target .* ReLU", error=TypeError),
    "target another class": Refused(dict, "the class dict", error=TypeError),
    "no channels": Refused(
        "act", r"'act' \(ReLU\): cannot infer its channels without sample_input: neither .* in_ch"
    ),
    "two arguments": Refused(
        "skip", r"'skip' \(Skip\): cannot infer its channels .*: its forward takes \(x.*, skip"
    ),
    "two arguments traced": Refused(
        "skip",
        r"'skip' .* to take one .* got a tensor \(2, 16, 6, 10\), a tensor \(2, 8, 6, 10\)",
        options={"sample_input": X},
    ),
    "list": Refused("context.branches", "cannot infer its channels"),
    "size changed alone": Refused(
        "stem", r"cannot replace 'stem' \(Sequential\): it changes .* size .* 32×32 to 16×16"
    ),
    "size changed traced": Refused("stem", "from 12×20 to 6×10", options={"sample_input": X}),
    "not called": Refused(
        "unused",
        r"the model does not call 'unused' when it runs on a tensor \(2, 3, 12, 20\)",
        options={"sample_input": X},
    ),
    "sample does not fit": Refused(
        "context",
        r"Net does not run on a tensor \(2, 2, 12, 20\): RuntimeError",
        options={"sample_input": X[:, :2]},
    ),
    "sample is a shape": Refused(
        "context",
        r"expected a sample_input with tensors, got \(1, 3, 8, 8\); did you mean torch.zeros",
        error=TypeError,
        options={"sample_input": (1, 3, 8, 8)},
    ),
    "other shape": Refused(
        "context", r"expected Shrinks to return \(1, 16, 32, 32\) .* got \(1, 16, 30, 30\)", Shrinks
    ),
    "breaks": Refused("context", "'context' .*: Breaks does not run .*does not work", Breaks),
    "no module": Refused(
        "context", "to build a torch.nn.Module, got int", lambda channels: channels, TypeError
    ),
    "an instance": Refused(
        "context",
        "expected a layer class or a callable .* got an instance of ChannelNonLocal",
        ChannelNonLocal(16),
        TypeError,
    ),
    "no callable": Refused(
        "context", "expected a layer class .* got an instance of int", 3, TypeError
    ),
    "unknown layer": Refused(
        "context",
        r"expected a layer of 'fully', 'channel', 'spatial'.* got 'fuly'; did you mean 'fully'\?$",
        "fuly",
    ),
    "layer and target exchanged": Refused(
        FullyAttentional,
        r"got 'context', a module of the model, which is the target: .* the target comes first",
        "context",
    ),
    "unknown option": Refused("context", "scal", error=TypeError, options={"scal": 1}),
    "bad option": Refused("context", "scale must be", error=TypeError, options={"scale": "x"}),
    "dtype as option": Refused(
        "context", "dtype come from the model", error=TypeError, options={"dtype": torch.half}
    ),
    "fails in the second place": Refused(Pyramid, "the second one", second_fails(), RuntimeError),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_layer_may_be_named_as_on_the_command_line(name: str, tmp_path: Path) -> None:
    model, named = net(), net()
    for each, layer in ((model, NAMED[name]), (named, name)):
        swapped = swap(each, "context", layer)
        inserted = insert(each, layer, after="stem.0")
        assert isinstance(swapped.changes[0].layer, NAMED[name])
        assert isinstance(inserted.changes[0].layer, NAMED[name])
    assert repr(named) == repr(model)
    inserted.save(tmp_path / "change.json")  # under the name of the class, not the short one
    assert NAMED[name].__name__ in (tmp_path / "change.json").read_text()


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_errors_leave_the_model_unchanged(case: Refused) -> None:
    model = net().train()
    before = snapshot(model)
    with pytest.raises(case.error, match=case.message):
        swap(model, case.target, case.replacement, **case.options)
    after = snapshot(model)
    after[3] = before[3]  # building a layer draws random weights
    assert same(after, before)


def test_a_module_that_returns_no_feature_map_is_an_error() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, self.conv(x)]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Features()
            self.pool = nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.backbone(x)[-1])

    model = Outer()
    with pytest.raises(
        ValueError,
        match=r"cannot insert after 'backbone' \(Features\): .* return .* got a list of 2",
    ):
        insert(model, ChannelNonLocal, after="backbone", sample_input=X)
    with pytest.raises(
        ValueError, match=r"'pool' \(Flatten\): expected .* got a tensor \(2, 960\)"
    ):
        insert(model, ChannelNonLocal, after="pool", sample_input=X)


def test_a_module_called_by_keyword_supports_insert_but_not_swap() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    model = Keyword()
    with pytest.raises(
        ValueError, match=r"expected it to take .* got input=a tensor \(2, 3, 12, 20\)"
    ):
        swap(model, "conv", ChannelNonLocal, sample_input=X)
    insert(model, ChannelNonLocal, after="conv", sample_input=X)
    assert model(X).shape == X.shape


def test_a_model_that_cannot_be_copied_is_an_error() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.ReLU())
    with pytest.raises(ValueError, match="cannot copy Sequential to infer its shapes"):
        insert(model, ChannelNonLocal, after="1", sample_input=X)
    model(X)
    assert insert(model, ChannelNonLocal, after="1", sample_input=X).changes[0].in_channels == 4


def test_old_weight_normalisation_is_copied() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU())
    assert insert(model, ChannelNonLocal, after="1", sample_input=X).changes[0].in_channels == 4


@pytest.mark.slow
@pytest.mark.parametrize("after", ["body", "context"])
def test_a_compiled_model_follows_later_changes(after: str) -> None:
    model = net()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = compiled(image())["out"]
    report = insert(model, ChannelNonLocal, after=after, gamma_init=0.5)
    changed = compiled(image())["out"]
    torch.testing.assert_close(changed, model(image())["out"])
    assert not torch.allclose(changed, before)
    remove(report)
    torch.testing.assert_close(compiled(image())["out"], before)
    torch._dynamo.reset()


@pytest.mark.slow
def test_inferring_shapes_of_a_compiled_model_does_not_compile() -> None:
    def never(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    model = torch.compile(net(), backend=never)
    insert(model, ChannelNonLocal, after="*.context", sample_input=X)
    torch._dynamo.reset()


def test_a_size_change_in_the_second_call_is_an_error() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d((12, 20))

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x) + self.pool(x[..., ::2, ::2])

    with pytest.raises(ValueError, match="from 6×10 to 12×20"):
        swap(Pool(), "pool", ChannelNonLocal, sample_input=X)


def test_an_unregistered_reference_is_an_error() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.pair = (self.conv,)

        def forward(self, x: Tensor) -> Tensor:
            return self.pair[0](x)

    model = Hidden()
    with pytest.raises(
        ValueError, match="cannot replace 'conv': the model calls it through a reference"
    ):
        swap(model, "conv", ChannelNonLocal, sample_input=X)
    assert isinstance(model.conv, nn.Conv2d)


def test_several_channel_counts_are_an_error() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(self.act(x)))

    with pytest.raises(ValueError, match="the same number of channels, got 3, 4"):
        swap(Twice(), "act", ChannelNonLocal, sample_input=X)


def test_a_model_that_branches_on_values_runs_on_real_tensors() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(x)) if x.mean().item() < 1 else x

    model = Branches().train()
    before = snapshot(model)
    with pytest.raises(ValueError, match="does not call 'conv'"):
        swap(model, "conv", ChannelNonLocal, sample_input=X + 2)
    assert same(snapshot(model), before)
    assert swap(model, "conv", ChannelNonLocal, sample_input=X).changes[0].out_channels == 4


def test_the_function_and_the_package_of_one_name_are_both_importable() -> None:
    from fullattn.swap import insert as inserting
    from fullattn.swap.report import Report

    assert callable(fullattn.swap)
    assert inserting is fullattn.insert
    assert Report.__module__ == "fullattn.swap.report"


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module as model, got list"):
        swap([nn.ReLU()], "0", ChannelNonLocal)  # type: ignore[arg-type]
