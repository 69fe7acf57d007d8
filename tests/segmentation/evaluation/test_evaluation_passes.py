"""Probabilities from one pass, from scales and flips, and from windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fullattn.segmentation.evaluation import segment
from fullattn.segmentation.evaluation.passes import starts

CLASSES = 5


def _images(height: int = 13, width: int = 18, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).double()


def _pixelwise() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Tanh(), nn.Conv2d(16, CLASSES, 1))
    return layers.double()


def _with_context() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, CLASSES, 5, padding=2).double()


def _mirrored(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with a kernel that is its own mirror image."""
    conv.weight.data = conv.weight.data + conv.weight.data.flip(3)
    return conv


def _bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """NumPy: corners not aligned, so that output pixel p lies at (p + 1/2) · in / out - 1/2."""

    def weights(size: int, wanted: int) -> np.ndarray[Any, Any]:
        matrix = np.zeros((wanted, size))
        for p in range(wanted):
            place = min(max((p + 0.5) * size / wanted - 0.5, 0), size - 1)
            left = int(place)
            right = min(left + 1, size - 1)
            matrix[p, left] += 1 - (place - left)
            matrix[p, right] += place - left
        return matrix

    y = np.einsum(
        "bkhw,Hh,Ww->bkHW", x.numpy(), weights(x.shape[2], height), weights(x.shape[3], width)
    )
    return torch.from_numpy(y)


sizes = st.integers(1, 40)


@given(size=sizes, window=sizes, stride=sizes)
def test_every_pixel_is_seen_and_no_window_leaves_the_axis(
    size: int, window: int, stride: int
) -> None:
    window = min(window, size)
    stride = min(stride, window)
    found = starts(size, window, stride)
    seen = {pixel for start in found for pixel in range(start, start + window)}
    assert seen == set(range(size))
    assert len(set(found)) == len(found)
    # No more windows than steps need.
    assert len(found) == -(-(size - window) // stride) + 1


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    window=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    data=st.data(),
)
def test_windows_do_not_change_a_pixelwise_model(
    height: int, width: int, window: tuple[int, int], data: st.DataObject
) -> None:
    stride = data.draw(st.none() | st.tuples(*(st.integers(1, length) for length in window)))
    model, images = _pixelwise(), _images(height, width)
    found = segment(model, images, window=window, stride=stride)
    torch.testing.assert_close(found, model(images).softmax(1))


@pytest.mark.parametrize("window", [(13, 18), (13, 40), (99, 18), (99, 99)])
def test_a_window_of_the_image_or_more_is_the_single_pass(window: tuple[int, int]) -> None:
    model, images = _with_context(), _images()
    assert torch.equal(segment(model, images, window=window), segment(model, images))


def test_a_single_pass_is_the_models_softmax() -> None:
    model, images = _with_context(), _images()
    assert torch.equal(segment(model, images), model(images).softmax(1))


def test_a_pixel_gets_the_average_of_the_windows_that_see_it() -> None:
    model, images = _with_context(), _images(5, 9)
    total, seen = np.zeros((2, CLASSES, 5, 9)), np.zeros((5, 9))
    for top in (0, 1):
        for left in (0, 3, 5):
            part = (..., slice(top, top + 4), slice(left, left + 4))
            total[part] += model(images[part]).detach().numpy()
            seen[part] += 1
    expected = torch.from_numpy(total / seen).softmax(1)
    torch.testing.assert_close(segment(model, images, window=(4, 4), stride=(3, 3)), expected)


def test_the_default_stride_is_two_thirds_of_the_window() -> None:
    model, images = _with_context(), _images(20, 30)
    expected = segment(model, images, window=(9, 12), stride=(6, 8))
    assert torch.equal(segment(model, images, window=(9, 12)), expected)


def test_flips_do_not_change_an_equivariant_model() -> None:
    model, images = _mirrored(_with_context()), _images()
    torch.testing.assert_close(segment(model, images, flip=True), segment(model, images))


def test_flips_average_both_orientations() -> None:
    model, images = _with_context(), _images()
    plain, mirrored = model(images).softmax(1), model(images.flip(3)).softmax(1).flip(3)
    assert not torch.allclose(plain, mirrored)
    torch.testing.assert_close(segment(model, images, flip=True), (plain + mirrored) / 2)


@pytest.mark.parametrize("window", [None, (8, 7)])
def test_flipping_the_images_flips_what_flips_and_scales_average(
    window: tuple[int, int] | None,
) -> None:
    # A stride of 1 makes the places of windows their own mirror image.
    options: dict[str, Any] = {"scales": (0.6, 1.0, 1.3), "flip": True, "window": window}
    if window:
        options["stride"] = (1, 1)
    model, images = _with_context(), _images()
    found = segment(model, images.flip(3), **options).flip(3)
    torch.testing.assert_close(found, segment(model, images, **options))


def test_scaled_logits_come_back_bilinearly_without_aligned_corners() -> None:
    # Chosen by the scaled size alone, so that the images' own scaling is not in it.
    logits = {
        size: torch.randn(1, CLASSES, *size).double() for size in ((6, 9), (13, 18), (20, 27))
    }
    images = _images(batch=1)
    found = segment(lambda x: logits[x.shape[2], x.shape[3]], images, scales=(0.5, 1, 1.5))
    passes = [_bilinear(each, 13, 18).softmax(1) for each in logits.values()]
    torch.testing.assert_close(found, sum(passes) / 3)


def test_images_are_scaled_with_antialiasing_and_without_aligned_corners() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    images = _images(12, 18)
    segment(model, images, scales=(0.5, 2))
    # By half, the antialiased kernel has weights 1, 3, 3, 1 over four pixels (away from the edge).
    kernel = torch.tensor([1, 3, 3, 1]).double() / 8
    kernel = (kernel[:, None] * kernel).expand(3, 1, 4, 4)
    smaller = F.conv2d(images, kernel, stride=2, groups=3, padding=1)
    torch.testing.assert_close(seen[0][..., 1:-1, 1:-1], smaller[..., 1:-1, 1:-1])
    torch.testing.assert_close(seen[1], _bilinear(images, 24, 36))


def test_windows_slide_over_the_scaled_image() -> None:
    seen = []

    def model(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return x

    segment(model, _images(12, 18), scales=(0.5, 2), window=(10, 10), stride=(10, 10))
    assert seen == [(6, 9)] + [(10, 10)] * 12


@given(
    scales=st.lists(st.floats(0.01, 2.5), min_size=1, max_size=3),
    flip=st.booleans(),
    window=st.none() | st.tuples(st.integers(4, 9), st.integers(4, 9)),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_probabilities_sum_to_1_at_the_images_size(
    scales: list[float], flip: bool, window: tuple[int, int] | None, size: tuple[int, int]
) -> None:
    images = _images(*size)
    found = segment(_with_context(), images, scales=scales, flip=flip, window=window)
    assert found.shape == (2, CLASSES, *size)
    torch.testing.assert_close(found.sum(1), torch.ones(2, *size).double())


def test_images_of_a_batch_are_segmented_alone() -> None:
    model, images = _with_context(), _images()
    options: dict[str, Any] = {"scales": (0.7, 1.0), "flip": True, "window": (8, 8)}
    alone = torch.cat([segment(model, image[None], **options) for image in images])
    torch.testing.assert_close(segment(model, images, **options), alone)


def test_nothing_is_changed_and_no_gradient_is_kept() -> None:
    model, images = _pixelwise(), _images()
    copy = images.clone()
    assert not segment(model, images, scales=(1, 1), flip=True, window=(4, 4)).requires_grad
    assert torch.equal(images, copy)
    kept = model(images).detach()
    answer = kept.clone()
    segment(lambda x: kept, images, flip=True)  # a model may return what it keeps
    assert torch.equal(kept, answer)


def test_averages_of_half_precision_are_float32() -> None:
    model = _pixelwise().to(torch.bfloat16)
    images = _images(9, 9).to(torch.bfloat16)
    for window in (None, (4, 4)):
        found = segment(model, images, window=window)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, model(images).float().softmax(1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scales": ()}, "at least one scale"),
        ({"scales": (1.0, 0.0)}, "scales above 0, got 0.0"),
        ({"scales": (-1.0,)}, "scales above 0, got -1.0"),
        ({"scales": (float("nan"),)}, "scales above 0, got nan"),
        ({"scales": (float("inf"),)}, "scales above 0, got inf"),
        ({"window": (0, 4)}, r"a window of two lengths of at least 1, got \(0, 4\)"),
        ({"window": (4, 4), "stride": (0, 1)}, "a stride of two lengths of at least 1"),
        ({"window": (4, 4), "stride": (4, 5)}, "would leave pixels out"),
        ({"stride": (4, 4)}, "expected a window for the stride"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        segment(_pixelwise(), _images(), **options)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda x: [x, x], "expected logits from the network, got list"),
        (lambda x: x[:, :, 1:], r"expected logits of shape \(2, K, 13, 18\), got \(2, 3, 12, 18\)"),
        (lambda x: x[:1], r"got \(1, 3, 13, 18\)"),
        (lambda x: x[0], r"got \(3, 13, 18\)"),
        (lambda x: x / 0 - x / 0, "output is nan"),
        (lambda x: torch.where(x == x.max(), torch.inf, x), "output is nan"),
    ],
)
def test_invalid_model_outputs_raise(model: Callable[[Tensor], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        segment(model, _images())


@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 3, 4, 5), (1, 3, 0, 5)])
def test_invalid_images_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected images of shape"):
        segment(_pixelwise(), torch.zeros(shape))
