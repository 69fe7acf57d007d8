"""Networks of other projects, small and with random weights, and where a layer goes into each."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fullattn
from fullattn.integrations.torchvision import ensure_importable
from fullattn.swap import Report
from helpers import yolo

CLASSES = 5

# What a package needs beside itself; all of these import torchvision.
NEEDS = {
    "torchvision": ("torchvision",),
    "timm": ("timm", "torchvision"),
    "segmentation_models_pytorch": ("segmentation_models_pytorch", "timm", "torchvision"),
    "transformers": ("transformers", "torchvision"),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "mmcv": ("mmcv", "mmengine", "torchvision"),
    "lightning": ("lightning", "torchvision"),
    "ultralytics": ("ultralytics", "onnx", "onnxruntime", "torchvision"),
    "mmseg": ("mmseg", "mmcv", "mmengine", "ftfy", "regex", "torchvision"),
}


def missing(package: str) -> str | None:
    """Why a package cannot be used here, or None."""
    absent = [name for name in NEEDS.get(package, (package,)) if not importlib.util.find_spec(name)]
    return f"{package} needs {', '.join(absent)}, not installed" if absent else None


def load(package: str) -> Any:
    """Import a package with what it needs on this machine, or skip the test with the reason."""
    if reason := missing(package):
        pytest.skip(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        if "torchvision" in NEEDS.get(package, ()):
            ensure_importable()
        if package == "mmseg":
            _stand_in_for_compiled_operators()
            return importlib.import_module("mmseg.models")
        if package == "ultralytics":
            return yolo.ready()
        if package == "mmcv":
            return importlib.import_module("mmcv.cnn")
        if package == "torchvision":
            return importlib.import_module("torchvision.models.segmentation")
        return importlib.import_module(package)


def _stand_in_for_compiled_operators() -> None:
    """mmseg imports mmcv.ops, which mmcv-lite does not have; none of the heads here calls them."""

    class Missing(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)

            def operator(*args: Any, **kwargs: Any) -> Any:
                raise RuntimeError(f"mmcv-lite has no compiled operator {name}")

            return operator

    if "mmcv._ext" not in sys.modules:
        sys.modules["mmcv._ext"] = Missing("mmcv._ext")


@dataclass(frozen=True)
class Network:
    """A network and one place in it for a layer.

    Attributes:
        name: for the test's id and the table in the documentation.
        package: whose it is.
        build: makes the network from the imported package.
        change: puts a layer in, from (network, sample input).
        inputs: what the network is called with, for a seed, a batch, a height and a width, which
            are multiples of 64.
        free_sizes: for torch.export, which of their axes are free: of the batch, and of height and
            width in units of 64.
        identity: whether the network computes the same as before, bit for bit.
    """

    name: str
    package: str
    build: Callable[[Any], nn.Module]
    change: Callable[[nn.Module, Any], Report]
    inputs: Callable[[int, int, int, int], Any] = lambda *shape: image(*shape)
    free_sizes: Callable[[Any, Any, Any], Any] = lambda *free: (_free(1, *free),)
    identity: bool = True

    def built(self, seed: int = 0) -> nn.Module:
        """The network with seeded random weights."""
        package = load(self.package)
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.build(package)


def image(seed: int, batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _free(stride: int, batch: Any, height: Any, width: Any) -> dict[int, Any]:
    """Free axes of a tensor whose height and width are those of the image over a stride."""
    return {0: batch, 2: (64 // stride) * height, 3: (64 // stride) * width}


def call(network: nn.Module, inputs: Any) -> Any:
    """Call with one argument, with several or with named ones, as a sample_input is meant."""
    if isinstance(inputs, dict):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, tuple) else network(inputs)


def tensors(result: Any) -> list[Tensor]:
    """Every tensor in a network's result."""
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if hasattr(result, "values") else result
    return [x for value in values for x in tensors(value)]


def _inserted(after: str, **options: Any) -> Callable[[nn.Module, Any], Report]:
    def change(network: nn.Module, sample: Any) -> Report:
        return fullattn.insert(
            network,
            fullattn.FullyAttentional,
            after=after,
            sample_input=sample,
            project=False,
            **options,
        )

    return change


def _swapped(
    target: Any, layer: type[nn.Module] = fullattn.FullyAttentional, **options: Any
) -> Callable[[nn.Module, Any], Report]:
    def change(network: nn.Module, sample: Any) -> Report:
        return fullattn.swap(network, target, layer, sample_input=sample, **options)

    return change


def _smp(name: str) -> Callable[[Any], nn.Module]:
    return lambda smp: getattr(smp, name)("resnet18", encoder_weights=None, classes=CLASSES)


def _torchvision(name: str) -> Callable[[Any], nn.Module]:
    return lambda segmentation: getattr(segmentation, name)(
        weights=None, weights_backbone=None, num_classes=CLASSES
    )


def _timm(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda timm: timm.create_model(name, features_only=True, pretrained=False, **options)


def _upernet(transformers: Any) -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=backbone,
            hidden_size=32,
            num_labels=CLASSES,
            auxiliary_in_channels=64,
            auxiliary_channels=16,
        )
    )


def _segformer(transformers: Any) -> nn.Module:
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            hidden_sizes=[8, 16, 32, 64],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 4, 8],
            decoder_hidden_size=32,
            num_labels=CLASSES,
        )
    )


def _pixel_values(*shape: int) -> Any:
    return {"pixel_values": image(*shape)}


def _free_pixel_values(*free: Any) -> Any:
    return {"pixel_values": _free(1, *free)}


_STAGES = ((8, 4), (16, 8), (32, 8), (64, 8))  # channels and stride of a pyramid of features


def _pyramid(seed: int, batch: int, height: int, width: int) -> Any:
    """The one argument of an mmsegmentation head: the features of four stages."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, c, height // stride, width // stride) for c, stride in _STAGES]
    return ([torch.randn(shape, generator=generator) for shape in shapes],)


def _free_pyramid(*free: Any) -> Any:
    return ([_free(stride, *free) for _, stride in _STAGES],)


_MM_COMMON: dict[str, Any] = {
    "num_classes": CLASSES,
    "channels": 16,
    "norm_cfg": {"type": "BN"},
    "align_corners": False,
}
_MM_LAST = {**_MM_COMMON, "in_channels": 64, "in_index": 3}


def _mm_head(name: str, **options: Any) -> Callable[[Any], nn.Module]:
    return lambda models: getattr(models, name)(**{**_MM_LAST, **options})


def _mm_encoder_decoder(models: Any) -> nn.Module:
    return models.EncoderDecoder(
        backbone={
            "type": "ResNet",
            "depth": 18,
            "base_channels": 8,
            "norm_cfg": {"type": "BN"},
            "out_indices": (0, 1, 2, 3),
        },
        decode_head={"type": "FCNHead", **_MM_LAST, "num_convs": 1},
        test_cfg={"mode": "whole"},
    )


def _is_non_local(name: str, module: nn.Module) -> bool:
    return type(module).__name__ == "NonLocal2d"


NETWORKS = (
    Network("smp Unet", "segmentation_models_pytorch", _smp("Unet"), _inserted("encoder.layer4")),
    Network("smp FPN", "segmentation_models_pytorch", _smp("FPN"), _inserted("decoder.p5")),
    Network(
        "smp PSPNet",
        "segmentation_models_pytorch",
        _smp("PSPNet"),
        _swapped("decoder.psp"),
        identity=False,
    ),
    Network(
        "smp DeepLabV3Plus",
        "segmentation_models_pytorch",
        _smp("DeepLabV3Plus"),
        _swapped("decoder.aspp"),
        identity=False,
    ),
    Network(
        "smp UPerNet", "segmentation_models_pytorch", _smp("UPerNet"), _inserted("decoder.psp")
    ),
    Network(
        "torchvision deeplabv3_resnet50",
        "torchvision",
        _torchvision("deeplabv3_resnet50"),
        _swapped("classifier.0"),
        identity=False,
    ),
    Network(
        "torchvision fcn_resnet50",
        "torchvision",
        _torchvision("fcn_resnet50"),
        _inserted("classifier.2"),
    ),
    Network(
        "torchvision lraspp_mobilenet_v3_large",
        "torchvision",
        _torchvision("lraspp_mobilenet_v3_large"),
        _inserted("classifier.cbr"),
    ),
    Network("timm resnet18 features", "timm", _timm("resnet18"), _inserted("layer4")),
    Network(
        "timm mobilenetv3_small features",
        "timm",
        _timm("mobilenetv3_small_050"),
        _inserted("blocks.5"),
    ),
    Network("timm convnext_atto features", "timm", _timm("convnext_atto"), _inserted("stages_3")),
    Network(
        "transformers UperNet",
        "transformers",
        _upernet,
        _inserted("backbone.encoder.stages.3"),
        _pixel_values,
        _free_pixel_values,
    ),
    Network(
        "transformers Segformer",
        "transformers",
        _segformer,
        _inserted("decode_head.linear_fuse"),
        _pixel_values,
        _free_pixel_values,
    ),
    Network(
        "mmseg FCNHead",
        "mmseg",
        _mm_head("FCNHead", num_convs=2),
        _inserted("convs"),
        _pyramid,
        _free_pyramid,
    ),
    Network(
        "mmseg NLHead",
        "mmseg",
        _mm_head("NLHead"),
        _swapped(_is_non_local, fullattn.SpatialNonLocal),
        _pyramid,
        _free_pyramid,
    ),
    Network(
        "mmseg DAHead",
        "mmseg",
        _mm_head("DAHead", pam_channels=4),
        _swapped("pam", project=False),
        _pyramid,
        _free_pyramid,  # gamma of both starts at 0
    ),
    Network(
        "mmseg UPerHead",
        "mmseg",
        _mm_head(
            "UPerHead", in_channels=[8, 16, 32, 64], in_index=[0, 1, 2, 3], pool_scales=(1, 2)
        ),
        _inserted("fpn_bottleneck"),
        _pyramid,
        _free_pyramid,
    ),
    Network(
        "mmseg PSPHead",
        "mmseg",
        _mm_head("PSPHead", pool_scales=(1, 2)),
        _inserted("bottleneck"),
        _pyramid,
        _free_pyramid,
    ),
    Network(
        "mmseg ASPPHead",
        "mmseg",
        _mm_head("ASPPHead", dilations=(1, 2)),
        _inserted("bottleneck"),
        _pyramid,
        _free_pyramid,
    ),
    Network("mmseg EncoderDecoder", "mmseg", _mm_encoder_decoder, _inserted("backbone.layer4")),
)


# What the tests of a network show, as headings of the table in the documentation.
COLUMNS = {
    "test_the_layer_is_in_its_place_and_the_shape_of_the_result_is_unchanged": "forward",
    "test_one_step_of_training_reaches_every_parameter_of_the_layer": "backward and a step",
    "test_state_dict_round_trip": "`state_dict`, pickle, deepcopy",
    "test_torch_compile_without_graph_breaks": "`torch.compile(fullgraph=True)`",
    "test_inductor_agrees_with_eager": "inductor",
    "test_strict_export_with_free_batch_and_size": "strict export, free B, H, W",
}


def table(names: Sequence[str], cells: Mapping[str, Mapping[str, str]]) -> str:
    """A page with what became of every test of every network.

    Args:
        names: of the networks, in their order.
        cells: by network and test: a tick, or why there is none.
    """
    versions = {
        name: metadata.version(name)
        for name in (
            *("torch", "segmentation-models-pytorch", "torchvision", "timm", "transformers"),
            *("mmcv-lite", "mmsegmentation"),
        )
    }
    reasons: list[str] = []

    def cell(text: str | None) -> str:
        if text is None:
            return "not run"
        if text == "✓":
            return text
        if text not in reasons:
            reasons.append(text)
        return f"[{reasons.index(text) + 1}]"

    lines = [
        "# Networks with our layers in them",
        "",
        "Written by `make networks`, with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". Random weights; images of 64×64, for exports of 128×192 and then 192×128; on the CPU. "
        "Which layer goes where is in the guides.",
        "",
        "| network | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " :-: |" * len(COLUMNS),
    ]
    for name in names:
        found = [cell(cells.get(name, {}).get(test)) for test in COLUMNS]
        lines.append(f"| {name} | {' | '.join(found)} |")
    lines += ["", *(f"[{number}]: {reason}  " for number, reason in enumerate(reasons, start=1))]
    return "\n".join(lines).rstrip() + "\n"
