"""FLANet and its head: equality with the official implementation, attentions, backbones, files."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullattn
from fullattn import FullyAttentional, checkpoints
from fullattn.checkpoints import CheckpointError
from fullattn.segmentation.models import FLANet, SegmentationHead, attentions, files
from fullattn.segmentation.models.backbone import load_weights
from helpers import official_code

EXACT = 1e-8


def small(num_classes: int = 5, backbone: str = "resnet18", **options: Any) -> FLANet:
    return FLANet(num_classes, backbone, **{"channels": 8, "out_channels": 8, **options})


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@torch.no_grad()
def trained(module: nn.Module) -> nn.Module:
    """Simulate training in float64: activations of ordinary size, gamma not 0."""
    generator = torch.Generator().manual_seed(2)
    module.double().train()
    for name, tensor in module.state_dict().items():
        if name.endswith("gamma"):
            tensor.fill_(0.7)
        elif name.endswith("weight") and tensor.dim() == 4:
            tensor.normal_(0.0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.9  # nearly the statistics of the images below, and not quite
    module(images(2, 3, 33, 47, dtype=torch.float64))
    return module.eval()


def all_logits(net: FLANet, x: Tensor) -> list[Tensor]:
    """Return main and auxiliary logits with every layer in evaluation mode."""
    net.eval()
    net.training = True  # of the network alone
    logits = net(x)
    net.training = False
    assert isinstance(logits, list)
    return logits


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        error = (mine - other).abs().max() / other.abs().max()
        assert error < EXACT


# The official network.


@torch.no_grad()
def test_official_weights_give_the_official_logits() -> None:
    theirs = trained(official_code.OfficialFLANet(7))
    with torch.device("meta"):  # all of its numbers come from the other
        ours = FLANet(7).double()
    ours.to_empty(device="cpu")
    checkpoints.load_into(ours, theirs.state_dict(), "flanet")
    x = images(1, 3, 64, 96, dtype=torch.float64)
    assert_same(all_logits(ours, x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=0, atol=EXACT)
    back = checkpoints.convert(ours.state_dict(), "flanet", reverse=True)
    original = theirs.state_dict()
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


@pytest.fixture(scope="module")
def official() -> nn.Module:
    return trained(official_code.OfficialFLANet(3, (1, 2, 2, 2), False, channels=16))


def converted_from(official: nn.Module, **options: Any) -> FLANet:
    """The small official network in ours; timm has none of its sizes, so the blocks are cut."""
    ours = FLANet(3, "resnet50", channels=16, out_channels=16, **options).double()
    backbone: Any = ours.backbone
    for name, count in (("layer1", 1), ("layer2", 2), ("layer3", 2), ("layer4", 2)):
        backbone[name] = backbone[name][:count]
    checkpoints.load_into(ours, official.state_dict(), "flanet")
    return ours


@torch.no_grad()
@pytest.mark.parametrize("size", [(33, 47), (65, 64)])
def test_odd_sizes_give_the_official_logits(official: nn.Module, size: tuple[int, int]) -> None:
    x = images(1, 3, *size, dtype=torch.float64)
    assert_same(all_logits(converted_from(official), x), official(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:mix_images=True:UserWarning")
def test_batches_are_mixed_only_on_request(official: nn.Module) -> None:
    x = images(3, 3, 33, 47, dtype=torch.float64)
    mixed = converted_from(official, attention_options={"mix_images": True})
    assert_same(all_logits(mixed, x), official(x))
    alone = torch.cat([official(image[None])[0] for image in x])
    torch.testing.assert_close(converted_from(official).eval()(x), alone, rtol=0, atol=EXACT)
    assert (alone - official(x)[0]).abs().max() > 1e-4


@torch.no_grad()
def test_first_blocks_dilated_as_in_timm_give_other_logits(official: nn.Module) -> None:
    x = images(1, 3, 33, 47, dtype=torch.float64)
    other = converted_from(official, uniform_dilation=False).eval()(x)
    assert (other - official(x)[0]).abs().max() > 1e-4


def test_official_weights_below_a_prefix_and_without_counters(official: nn.Module) -> None:
    weights = {
        f"module.{name}": x
        for name, x in official.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    with pytest.raises(ValueError, match=r"such a layer is at 'module', 'module\.fully'"):
        checkpoints.convert(weights, "flanet")
    converted = checkpoints.convert(weights, "flanet", prefix="module")
    assert converted.keys() == converted_from(official).state_dict().keys()


@pytest.mark.parametrize("missing", ["fully.gamma", "conv_out3.conv.5.bias", "conv.3.weight"])
def test_a_missing_official_tensor_is_named(official: nn.Module, missing: str) -> None:
    weights = {name: x for name, x in official.state_dict().items() if name != missing}
    with pytest.raises(ValueError, match=re.escape(f"missing keys [{missing!r}]")):
        checkpoints.convert(weights, "flanet")


def test_official_weights_of_another_class_count_raise(official: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"classifier\.\w+': layer \(4.*, checkpoint \(3"):
        checkpoints.load_into(
            FLANet(4, "resnet50", channels=16, out_channels=16), official.state_dict(), "flanet"
        )


# What differs between attentions.


@pytest.mark.parametrize("attention", attentions())
def test_networks_differ_in_attention_alone(attention: str) -> None:
    def built(name: str) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return small(attention=name).state_dict()

    reference = built("none")
    mine = built(attention)
    part = {name for name in mine if name.startswith("head.attention.")}
    assert mine.keys() - part == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in reference)


@torch.no_grad()
@pytest.mark.parametrize("attention", attentions())
def test_every_attention_starts_from_the_same_function(attention: str) -> None:
    torch.manual_seed(3)
    plain = SegmentationHead(6, 4, attention="none", channels=8, out_channels=8, norm_layer=None)
    torch.manual_seed(3)
    head = SegmentationHead(6, 4, attention=attention, channels=8, out_channels=8, norm_layer=None)
    plain.eval(), head.eval()
    x = images(2, 6, 5, 7)
    if attention == "dual":  # sums two residuals
        head.attention.register_forward_hook(lambda module, inputs, output: output / 2)
    torch.testing.assert_close(head(x), plain(x))


@pytest.mark.parametrize("attention", [name for name in attentions() if name != "none"])
def test_every_attention_is_trained_without_mixing_images(attention: str) -> None:
    torch.manual_seed(0)
    head = SegmentationHead(
        6, 4, attention=attention, channels=8, out_channels=8, dropout=0.0, norm_layer=None
    ).double()
    for parameter in head.attention.parameters():
        if not parameter.any():  # what starts at 0
            nn.init.normal_(parameter, 0.0, 0.5)
    head.eval()
    x = images(2, 6, 5, 7, dtype=torch.float64).requires_grad_()
    y = head(x)
    gradients = torch.autograd.grad(y[0].square().sum(), [x, *head.attention.parameters()])
    assert gradients[0][0].abs().max() > 0
    assert gradients[0][1].abs().max() == 0
    for (name, _), gradient in zip(head.attention.named_parameters(), gradients[1:], strict=True):
        # The softmax over the keys does not see what is the same for all keys.
        assert gradient.abs().max() > 0 or name.endswith("key.bias"), name


def test_the_baseline_has_the_parameters_of_the_fully_attentional_head() -> None:
    def count(attention: str) -> int:
        head = SegmentationHead(6, 4, attention=attention, channels=8, out_channels=8)
        return sum(parameter.numel() for parameter in head.parameters())

    assert count("convolution") == count("fully")


def test_dual_is_the_sum_and_channel_spatial_one_after_the_other() -> None:
    x = images(2, 8, 5, 7)
    dual = SegmentationHead(6, 4, attention="dual", channels=8).attention.eval()
    chain = SegmentationHead(6, 4, attention="channel_spatial", channels=8).attention.eval()
    for part in (dual, chain):
        nn.init.constant_(part.channel.gamma, 0.5)
        nn.init.constant_(part.spatial.output.norm.weight, 0.5)
    torch.testing.assert_close(dual(x), dual.channel(x) + dual.spatial(x))
    torch.testing.assert_close(chain(x), chain.spatial(chain.channel(x)))


def test_callables_and_options_reach_the_layer() -> None:
    layer = partial(FullyAttentional, project=False, scale=0.25)
    assert small(attention=layer).head.attention.scale == 0.25
    options = {"scale": None, "gamma_init": 0.1}
    attention = small(attention="fully", attention_options=options).head.attention
    assert attention.scale is None
    assert attention.gamma.item() == pytest.approx(0.1)


# Backbones and modes.


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "options", "stride"),
    [
        ("resnet18", {}, 8),
        ("resnet18", {"output_stride": 16}, 16),
        ("resnet18", {"output_stride": 32}, 32),
        ("mobilenetv2_100", {}, 8),
        ("hrnet_w18_small", {}, 4),
        ("convnext_atto", {}, 8),
        ("swin_tiny_patch4_window7_224", {"output_stride": 32, "img_size": (64, 96)}, 32),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_backbones_of_timm(backbone: str, options: dict[str, Any], stride: int) -> None:
    options = dict(options)
    size = options.pop("img_size", None)
    net = small(backbone=backbone, **options, backbone_options={"img_size": size} if size else {})
    seen = []
    net.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    x = images(2, 3, 64, 96)
    logits = all_logits(net, x)
    assert [tuple(y.shape) for y in logits] == [(2, 5, 64, 96)] * 3
    assert seen[0][2:] == (64 // stride, 96 // stride)
    assert net(x).shape == (2, 5, 64, 96)


@torch.no_grad()
def test_hrnet_gives_its_branches_resized_and_concatenated() -> None:
    net = small(backbone="hrnet_w18_small").eval()
    x = images(1, 3, 64, 96)
    branches = net.backbone(x)
    earlier, later, last = net._stages(branches)
    assert torch.equal(earlier, branches[1])
    assert torch.equal(later, branches[2])
    assert last.shape[1] == sum(branch.shape[1] for branch in branches)
    start = branches[0].shape[1]
    assert torch.equal(last[:, :start], branches[0])
    coarse = F.interpolate(branches[3], (16, 24), mode="bilinear", align_corners=False)
    assert torch.equal(last[:, -branches[3].shape[1] :], coarse)


def test_without_auxiliary_heads_training_returns_a_list_of_one_tensor() -> None:
    net = small(auxiliary=False)
    assert len(net(images(2, 3, 32, 48))) == 1
    assert not list(net.auxiliary.parameters())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: small(0), ValueError, "num_classes must be a positive integer, got 0"),
        (lambda: small(2.5), TypeError, "num_classes must be a positive integer, got 2.5"),
        (
            lambda: small(backbone="resnet1"),
            ValueError,
            "has no model 'resnet1'; similar names are",
        ),
        (lambda: small(backbone=None), TypeError, "backbone must be a name in timm, got NoneType"),
        (lambda: small(attention="fuly"), ValueError, "did you mean 'fully'?"),
        (lambda: small(attention=3), TypeError, "expected attention to be a name or a callable"),
        (
            lambda: small(attention=lambda c: None),
            TypeError,
            r"expected attention\(8\) to return a module",
        ),
        (
            lambda: small(attention="dual", attention_options={"scale": None}),
            ValueError,
            "attention_options need attention of 'fully', 'channel', 'spatial', got 'dual'",
        ),
        (lambda: small(output_stride=4), ValueError, "output_stride must be one of 8, 16, 32"),
        (lambda: small(dropout=1.5), ValueError, "dropout must be from 0 to 1, got 1.5"),
        (
            lambda: small(backbone="swin_tiny_patch4_window7_224"),
            ValueError,
            "cannot build 'swin_tiny_patch4_window7_224' as a backbone with {'output_stride': 8}: "
            ".*; output_stride=32 keeps the network's own strides",
        ),
        (
            lambda: small(backbone="resnet18").eval()(torch.zeros(1, 4, 32, 32)),
            ValueError,
            r"expected images of shape \(B, 3, H, W\), got \(1, 4, 32, 32\)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_arguments_raise(
    build: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


# Files.


def description(net: FLANet, **changes: Any) -> dict[str, Any]:
    described = files.Description(
        model=files.describe(net),
        dataset="tiny",
        classes=tuple("abcde"),
        palette=[(i, i, i) for i in range(5)],
        groups={"thin": ("a",)},
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        step=7,
    )
    return {**described.plain(), **changes}


def save(path: Path, net: FLANet, **changes: Any) -> Path:
    weights = {f"model.{name}": x for name, x in net.state_dict().items()}
    torch.save({"state_dict": weights, "fullattn": description(net, **changes)}, path)
    return path


@torch.no_grad()
def test_a_file_gives_the_same_network_back(tmp_path: Path) -> None:
    net = small(attention="channel", attention_options={"scale": None}, output_stride=16).eval()
    found = files.load(save(tmp_path / "net.pt", net))
    x = images(1, 3, 32, 48)
    assert torch.equal(found.model(x), net(x))
    assert found.description.step == 7
    assert found.description.groups == {"thin": ["a"]}
    assert found.model.head.attention.scale is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "does not describe its network"),
        ({"classes": ["a"]}, "expected 5 class names, got 1"),
        ({"model": {"num_classes": 5, "backbone": "resnet26"}}, r"into FLANet: .*Missing key\(s\)"),
        ({"model": {"num_classes": 5, "bacbone": "x"}}, "cannot be built.*bacbone"),
    ],
    ids=["format", "classes", "architecture", "argument"],
)
def test_an_inconsistent_file_raises(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "net.pt", small(), **changes)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}.*{message}"):
        files.load(path)


def test_a_file_without_description_or_truncated_raises(tmp_path: Path) -> None:
    alone = tmp_path / "weights.pt"
    torch.save(small().state_dict(), alone)
    with pytest.raises(CheckpointError, match=r"weights\.pt does not describe its network"):
        files.load(alone)
    whole = save(tmp_path / "net.pt", small())
    cut = tmp_path / "cut.pt"
    cut.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cut\.pt is truncated or damaged"):
        files.load(cut)


def test_a_callable_attention_cannot_be_described(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a file cannot hold attention="):
        files.describe(small(attention=partial(FullyAttentional, project=False)))


def test_weights_of_another_backbone_raise_and_change_nothing(tmp_path: Path) -> None:
    other, backbone = tmp_path / "resnet26.pt", small().backbone
    before = copy.deepcopy(backbone.state_dict())
    torch.save(small(backbone="resnet26").backbone.state_dict(), other)
    with pytest.raises(
        CheckpointError, match=r"cannot load .*resnet26\.pt into \w+: .*size mismatch"
    ):
        load_weights(backbone, other)
    for name, x in before.items():
        assert torch.equal(backbone.state_dict()[name], x), name


def test_backbone_weights_are_found_in_a_whole_network_and_below_its_classifier(
    tmp_path: Path,
) -> None:
    source, target = small(), small()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "whole.pt")
    load_weights(target.backbone, tmp_path / "whole.pt")
    for name, x in source.backbone.state_dict().items():
        assert torch.equal(target.backbone.state_dict()[name], x)
    weights = {**source.backbone.state_dict(), "fc.weight": torch.zeros(1000, 512)}
    torch.save(weights, tmp_path / "classifier.pt")
    other = small()
    load_weights(other.backbone, tmp_path / "classifier.pt")
    assert torch.equal(
        next(iter(other.backbone.parameters())), next(iter(source.backbone.parameters()))
    )


# As a module among others.


def test_a_network_is_copied_and_compiled_whole() -> None:
    net = small(attention="fully").eval()
    x = images(1, 3, 32, 48)
    assert torch.equal(copy.deepcopy(net)(x), net(x))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.export.Dim, "AUTO"), reason="PyTorch 2.4 and 2.5 have no Dim.AUTO"
)
def test_a_network_is_exported_with_dynamic_sizes() -> None:
    net = small(attention="fully").eval()
    free = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(net, (images(2, 3, 64, 96),), dynamic_shapes=({**free},))
    x = images(3, 3, 72, 80)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)


def test_models_are_part_of_the_package() -> None:
    assert fullattn.models.FLANet is FLANet
