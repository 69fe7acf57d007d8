"""The converter of TensorFlow's quantised MobileNetV2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mobilenetv2
from fullattn.checkpoints import CheckpointError
from fullattn.segmentation.models import FLANet
from helpers import SHARED_DATA

WEIGHTS = SHARED_DATA / "mobilenetv2_imagenet"


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def small(**options: Any) -> FLANet:
    return FLANet(5, options.pop("backbone", "resnet18"), channels=16, out_channels=16, **options)


def quantised(path: Path) -> dict[str, Tensor]:
    """Made-up weights in the file's form, and what they stand for."""
    generator = numpy.random.default_rng(0)
    net = small(backbone="mobilenetv2_100", backbone_options={"pad_type": "same"}).backbone
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    arrays, weights = {}, {}
    for theirs, ours, _ in mobilenetv2._layers():
        shape = shapes[f"{ours}.weight"]
        values = generator.integers(-127, 128, shape).astype(numpy.int8)
        fan_in = int(numpy.prod(shape[1:]))
        scale = generator.uniform(0.5, 1.5, shape[0]).astype(numpy.float32) / 127 / fan_in**0.5
        zero = generator.integers(-3, 4, shape[0]).astype(numpy.int8)
        bias = generator.normal(0, 0.1, shape[0]).astype(numpy.float32)
        arrays |= {
            f"{theirs}.weight.q": values,
            f"{theirs}.weight.scale": scale,
            f"{theirs}.weight.zp": zero,
            f"{theirs}.bias": bias,
        }
        column = (slice(None), None, None, None)
        real = (values.astype(numpy.float32) - zero[column]) * scale[column]
        weights |= {f"{theirs}.weight": torch.from_numpy(real).double()}
        weights |= {f"{theirs}.bias": torch.from_numpy(bias).double()}
    numpy.savez(path, **arrays)
    return weights


# Output channels, stride and whether there is a residual, of blocks 1 to 17.
ARCHITECTURE = (
    [(16, 1, 0), (24, 2, 0), (24, 1, 1), (32, 2, 0), (32, 1, 1), (32, 1, 1), (64, 2, 0)]
    + [(64, 1, 1)] * 3
    + [(96, 1, 0), (96, 1, 1), (96, 1, 1), (160, 2, 0), (160, 1, 1), (160, 1, 1), (320, 1, 0)]
)


def folded(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The folded network written from its table, with TensorFlow's padding."""

    def convolve(name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        if kernel.shape[-1] == 3:
            pads = []
            for size in (x.shape[-1], x.shape[-2]):
                total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
                pads += [total // 2, total - total // 2]
            x = F.pad(x, pads)
        return F.conv2d(x, kernel, weights[f"{name}.bias"], stride, groups=groups)

    x = F.relu6(convolve("stem", x, 2))
    for number, (_, stride, residual) in enumerate(ARCHITECTURE, start=1):
        name, before = f"block{number}", x
        if number > 1:
            x = F.relu6(convolve(f"{name}.expand", x))
        x = F.relu6(convolve(f"{name}.dw", x, stride, groups=x.shape[1]))
        x = convolve(f"{name}.project", x) + (before if residual else 0)
    return x


def same_padded(**options: Any) -> FLANet:
    return small(backbone="mobilenetv2_100", backbone_options={"pad_type": "same"}, **options)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (65, 47)])
def test_quantised_mobilenetv2_gives_the_folded_network(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    weights = quantised(tmp_path / "weights.npz")
    net = same_padded(output_stride=32)
    mobilenetv2.load_into(net.backbone, tmp_path / "weights.npz")
    net.double().eval()
    x = images(2, 3, *size, dtype=torch.float64)
    expected = folded(weights, x)
    error = (net.backbone(x)[-1] - expected).abs().max() / expected.abs().max()
    assert error < 1e-5  # of the file's float32


@torch.no_grad()
def test_unfolded_statistics_leave_the_function_and_bring_training_mode_to_it(
    tmp_path: Path,
) -> None:
    quantised(tmp_path / "weights.npz")
    net = same_padded()
    x = images(4, 3, 64, 96, dtype=torch.float64)
    mobilenetv2.load_into(net.backbone, tmp_path / "weights.npz")
    before = net.double().eval().backbone(x)[-1]
    net.train()
    mobilenetv2.unfold_batch_norm(net.backbone, x)
    assert net.backbone.training
    torch.testing.assert_close(net.backbone(x)[-1], before, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(net.eval().backbone(x)[-1], before, rtol=0.2, atol=0.2)


@torch.no_grad()
def test_real_weights_give_the_folded_network() -> None:
    path = WEIGHTS / "mnv2_tf2_ptq_int8.npz"
    if not path.exists():
        pytest.skip(f"no {path.name} in shared/data/mobilenetv2_imagenet")
    weights = {}
    with numpy.load(path) as file:
        for theirs, _, _ in mobilenetv2._layers():
            values = file[f"{theirs}.weight.q"].astype(numpy.float64)
            shape = (-1, *[1] * (values.ndim - 1))
            zero = file[f"{theirs}.weight.zp"].astype(numpy.float64).reshape(shape)
            values = (values - zero) * file[f"{theirs}.weight.scale"].reshape(shape)
            weights[f"{theirs}.weight"] = torch.from_numpy(values)
            weights[f"{theirs}.bias"] = torch.from_numpy(file[f"{theirs}.bias"]).double()
    net = same_padded(output_stride=32)
    mobilenetv2.load_into(net.backbone, path)
    x = torch.rand(1, 3, 64, 96, dtype=torch.float64) * 2 - 1
    expected = folded(weights, x)
    found = net.double().eval().backbone(x)[-1]
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_weights_of_another_backbone_or_padding_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    quantised(path)
    with pytest.raises(CheckpointError, match="holds the weights of mobilenetv2_100"):
        mobilenetv2.load_into(small().backbone, path)
    with pytest.raises(CheckpointError, match="pad_type"):
        mobilenetv2.load_into(small(backbone="mobilenetv2_100").backbone, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"weights\.npz is not a file of MobileNetV2"):
        mobilenetv2.load_into(same_padded().backbone, path)
