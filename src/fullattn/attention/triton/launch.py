"""From tensors to launches: how the slices of a feature map are handed to the kernels.

    forward:   columns, then rows, one `forward` launch each; the second adds its result to the
               first's, and gamma and the residual go with it.
    backward:  columns, then rows; `backward_queries` writes or adds one part of the gradient of x
               and leaves δ, `backward_keys` adds the other and leaves sums for the key's gradient.

Slices are read where they lie if their tokens or their features are neighbours in memory and all
strides keep to multiples of 16 numbers: then loads are 16 bytes wide and fly while others compute.
Slices that lie otherwise (columns of a contiguous map, whose every number is in another memory
sector; rows of 97 numbers, most of which begin unaligned) pass through a window: a buffer of
bounded size with a few slices in the kernels' favourite order, filled, used and filled again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fullattn.attention.sizes import Size, maximum, minimum, where
from fullattn.attention.triton.configurations import features_class, power_of_two
from fullattn.reshape import COLUMNS, ROWS

__all__ = [
    "KernelName",
    "Launch",
    "Run",
    "backward",
    "empty_result",
    "forward",
    "padded",
    "slices_each",
    "window",
    "workspace",
]

# Bytes of one tensor's window: small beside the tensors that need it, and large enough that a
# launch has several programs for every multiprocessor (2 images of 512x96x96 in bfloat16).
WINDOW = 24 * 2**20
# Read all slices where they lie, however that is: right, and by count of memory sectors a few times
# slower. `benchmarks/gpu.py` sets it to measure what the windows are worth.
IN_PLACE = False
# Programs that `backward_keys` aims at, 4 for each multiprocessor of an H100. Not asked of the
# card, because the order in which a key's gradient is summed hangs on it.
_PROGRAMS = 528
_ALIGNED = 16
_LOG2_E = 1 / math.log(2)

# Where a kernel fills windows and empties them: PyTorch's own copy is slow where memory is turned.
# (On "meta" nothing is copied; the launch is there for who counts or compiles launches.)
COPY_BY_KERNEL = {"cuda", "meta"}

KernelName = Literal["forward", "backward_queries", "backward_keys", "copy"]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, but for its configuration.

    Attributes:
        kernel: name of the kernel.
        arguments: its tensors and numbers.
        constants: its compile-time constants, but for those of the configuration.
        programs: number of programs that make a given number of tokens' results each.
    """

    kernel: KernelName
    arguments: dict[str, Any]
    constants: dict[str, Any]
    programs: Callable[[int], int]


Run = Callable[[Launch], None]


def padded(features: Any) -> Any:
    """The number of features in a window: the next multiple of 16."""
    return -(-features // _ALIGNED) * _ALIGNED


def _strides(slices: Tensor) -> list[int]:
    # An axis of length 1 may have any stride; 0 is aligned.
    return [
        0 if size == 1 else stride
        for size, stride in zip(slices.shape, slices.stride(), strict=True)
    ]


def _is_readable(slices: Tensor) -> bool:
    """Whether slices (B, S, C, D), or keys (B, C, D), are read where they lie."""
    *outer, tokens, features = _strides(slices)
    if slices.device.type != "meta" and slices.data_ptr() % 16:
        return False
    if any(stride % _ALIGNED for stride in outer):
        return False
    if tokens == 1:
        return features % _ALIGNED == 0 and slices.shape[-2] % _ALIGNED == 0
    return features == 1 and tokens % _ALIGNED == 0 and slices.shape[-1] % _ALIGNED == 0


def _buffer(x: Tensor, *shape: int) -> Tensor:
    """A contiguous buffer of a shape, with zeros up to an aligned number of features."""
    *outer, features = shape
    buffer = x.new_empty(*outer, padded(features))
    buffer[..., features:] = 0
    return buffer


def _readable_key(key: Tensor) -> Tensor:
    buffer = _buffer(key, *key.shape)
    buffer[..., : key.shape[-1]] = key
    return buffer


@dataclass(frozen=True)
class _Branch:
    """Some slices of one branch, as the kernels are given them.

    Attributes:
        maps: the slices of each feature map, (b, s, C, D), of which the last is the result.
        key: (b, C, D).
        rows: where in (B, S, C) their rows are.
    """

    maps: tuple[Tensor, ...]
    key: Tensor
    rows: tuple[slice, slice]


def _branches(key: Tensor, *slices: Tensor, adds: bool, run: Run) -> Iterator[_Branch]:
    """One branch in as many parts as its windows need; what is written there is put back."""
    batch, count, tokens, features = slices[0].shape
    if IN_PLACE or all(map(_is_readable, slices)):
        key = key if _is_readable(key) else _readable_key(key)[..., :features]
        yield _Branch(slices, key, (slice(0, batch), slice(0, count)))
        return
    key = _readable_key(key)
    images, width = window(slices[0].shape, max(x.element_size() for x in slices))
    buffers = [_buffer(x, images, width, tokens, features) for x in slices]
    for image in range(0, batch, images):
        for first in range(0, count, width):
            rows = slice(image, image + images), slice(first, first + width)
            parts = [x[rows] for x in slices]
            held = [buffer[: len(parts[0]), : parts[0].shape[1]] for buffer in buffers]
            for part, of_it in zip(parts if adds else parts[:-1], held, strict=False):
                _copy(part, of_it[..., :features], run)
            yield _Branch(tuple(held), key[rows[0]], rows)
            _copy(held[-1][..., :features], parts[-1], run)


def _copy(source: Tensor, target: Tensor, run: Run) -> None:
    """Copy slices (b, s, C, D) from one order in memory into another, along both."""
    if source.device.type not in COPY_BY_KERNEL:
        target.copy_(source)
        return
    # The map's own unit axis and the window's, which is that of the features, span the tiles.
    across, other = (2, 1) if 1 in (source.stride(2), target.stride(2)) else (1, 2)
    order = (0, other, across, 3)
    batch, rest, length, features = (source.shape[axis] for axis in order)
    tile, tile_features = (min(64, power_of_two(size)) for size in (length, features))
    arguments: dict[str, Any] = {"source": source, "target": target}
    arguments |= {"A": length, "D": features, "R": rest}
    reach = 0
    for name, slices in (("source", source), ("target", target)):
        strides = _strides(slices)
        arguments |= {f"{name}_{of}": strides[axis] for of, axis in zip("brad", order, strict=True)}
        reach = max(reach, length * strides[across] + features * strides[3])
    constants = {"WIDE": reach >= 2**31, "TILE_A": tile, "TILE_D": tile_features}
    programs = batch * rest * -(-length // tile) * -(-features // tile_features)
    run(Launch("copy", arguments, constants, lambda own: programs))


def window(shape: Sequence[Any], element_size: Any) -> tuple[Any, Any]:
    """How many images and slices of them one window holds.

    Args:
        shape: of the slices, (B, S, C, D).
        element_size: bytes of an element.

    Returns:
        Images, and slices of each; only where it is one image are they fewer than all.
    """
    batch, count, tokens, features = shape
    at_once = maximum(1, WINDOW // (tokens * padded(features) * element_size))
    # As even as possible: a small last part would leave most of the card idle.
    images = _even(batch, maximum(1, at_once // count))
    return images, _even(count, minimum(at_once, count))


def slices_each(slices: Any, tokens: Any) -> Any:
    """How many slices one program of `backward_keys` goes through.

    Args:
        slices: of all images of a launch.
        tokens: C.

    Returns:
        As many as leave `_PROGRAMS` programs, and 1 at least.
    """
    return maximum(1, slices * -(-tokens // 64) // _PROGRAMS)


def _even(total: Any, most: Any) -> Any:
    """The length of the longest part when `total` is cut into parts of at most `most`."""
    return -(-total // -(-total // most))


def workspace(shape: Sequence[Size], size: Size) -> tuple[Size, Size]:
    """Bytes that both branches take besides inputs, result and statistics.

    Args:
        shape: of the feature map, (B, C, H, W), contiguous.
        size: bytes of an element.

    Returns:
        Forward, and backward without the gradients of the keys.
    """
    batch, channels, height, width = shape
    columns = _branch_workspace((batch, width, channels, height), size, in_place=0)
    in_place = 1 - minimum(1, width - width // _ALIGNED * _ALIGNED)
    rows = _branch_workspace((batch, height, channels, width), size, in_place=in_place)
    return maximum(columns[0], rows[0]), maximum(columns[1], rows[1])


def _branch_workspace(slices: Sequence[Size], size: Size, *, in_place: Size) -> tuple[Size, Size]:
    """What one branch takes.

    Windows of x and the result, backward of the gradient too, and a readable key, where slices are
    not read in place; backward the sums for the key's gradient that the programs leave.
    """
    batch, count, channels, features = slices
    images, width = window(slices, size)
    images, width = where(in_place, batch, images), where(in_place, count, width)
    features = where(in_place, features, padded(features))
    windows = (1 - in_place) * images * width * channels * features * size
    key = (1 - in_place) * batch * channels * features * size
    parts = -(-width // slices_each(images * width, channels))
    sums = 4 * images * (parts + 1) * channels * features
    return 2 * windows + key, 3 * windows + key + sums


def _named_strides(name: str, x: Tensor, axes: str) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, _strides(x), strict=True)}


def _shared(
    branch: _Branch, names: tuple[str, ...], lse: Tensor, scale: float, precision: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants that every kernel takes."""
    x = branch.maps[0]
    _, count, tokens, features = x.shape
    arguments: dict[str, Any] = dict(zip(names, branch.maps, strict=True))
    arguments |= {"key": branch.key, "lse": lse[branch.rows]}
    arguments |= {"S": count, "C": tokens, "D": features, "scale": scale * _LOG2_E}
    reach = 0
    for name, slices in zip(names, branch.maps, strict=True):
        arguments |= _named_strides(name, slices, "bstf")
        reach = max(reach, tokens * slices.stride(-2) + features * slices.stride(-1))
    arguments |= _named_strides("key", branch.key, "btf") | {"lse_b": lse.stride(0)}
    constants = {
        "CHANNELS": power_of_two(tokens),
        "FEATURES": features_class(features),
        "LAYOUT": "features" if x.stride(-1) == 1 else "tokens",
        "PADDED": padded(features),
        "UNIT": math.gcd(tokens, 128),
        "COVERS_PADDED": features % _ALIGNED == 0,
        "PRECISION": precision,
        "WIDE": reach >= 2**31,
    }
    return arguments, constants


def _blocks(count: int, tokens: int) -> Callable[[int], int]:
    return lambda own: count * -(-tokens // own)


def empty_result(x: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `forward` returns, not yet computed.

    Args:
        x: as given to `forward`.
        gamma: as given to `forward`.

    Returns:
        The result, in the wider dtype of x and gamma, and the sums of the rows of both maps.
    """
    batch, channels, height, width = x.shape
    dtype = x.dtype if gamma is None else torch.promote_types(x.dtype, gamma.dtype)
    return (
        torch.empty_like(x, dtype=dtype),
        x.new_empty(batch, width, channels, dtype=torch.float32),
        x.new_empty(batch, height, channels, dtype=torch.float32),
    )


def forward(
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    gamma: Tensor | None,
    scale: float,
    precision: str,
    run: Run,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over columns plus attention over rows, times gamma plus x where there is a gamma.

    Args:
        x: feature map, (B, C, H, W), not empty.
        column_key: (B, C, H).
        row_key: (B, C, W).
        gamma: one number, or None.
        scale: factor on the scores, of either sign.
        precision: of float32 products: "ieee" or "tf32".
        run: launches a kernel.

    Returns:
        The result (B, C, H, W) in x's memory layout, and of the maps' rows log2 Σ 2^score:
        (B, W, C) for columns and (B, H, C) for rows, which the backward needs.
    """
    out, column_lse, row_lse = empty_result(x, gamma)

    # A function, so that one branch's window is given back before the other's is taken.
    def attend(cut: Callable[[Tensor], Tensor], key: Tensor, lse: Tensor, last: bool) -> None:
        for branch in _branches(key, cut(x), cut(out), adds=last, run=run):
            arguments, constants = _shared(branch, ("x", "out"), lse, scale, precision)
            arguments["gamma"] = x if gamma is None else gamma
            constants |= {"ADD": last, "RESIDUAL": last and gamma is not None}
            images, count, tokens, _ = branch.maps[0].shape
            run(Launch("forward", arguments, constants, _blocks(images * count, tokens)))

    attend(COLUMNS, column_key, column_lse, False)
    attend(ROWS, row_key, row_lse, True)
    return out, column_lse, row_lse


def backward(
    grad: Tensor,
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    gamma: Tensor | None,
    column_lse: Tensor,
    row_lse: Tensor,
    scale: float,
    precision: str,
    run: Run,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of what `forward` computes.

    Args:
        grad: gradient of the result, (B, C, H, W).
        x: as given to `forward`.
        column_key: as given to `forward`.
        row_key: as given to `forward`.
        gamma: as given to `forward`.
        column_lse: as returned by `forward`.
        row_lse: as returned by `forward`.
        scale: as given to `forward`.
        precision: as given to `forward`.
        run: launches a kernel.

    Returns:
        The gradients of x, column_key, row_key and gamma; the last is empty without a gamma.
    """
    grad = grad.to(x.dtype)
    grad_x = torch.empty_like(x)
    grad_gamma = x.new_zeros((), dtype=torch.float32)

    def differentiate(
        cut: Callable[[Tensor], Tensor], key: Tensor, lse: Tensor, first: bool
    ) -> Tensor:
        delta = torch.empty_like(lse)
        grad_key = torch.zeros_like(key, dtype=torch.float32)
        for branch in _branches(key, cut(x), cut(grad), cut(grad_x), adds=not first, run=run):
            arguments, constants = _shared(branch, ("x", "grad", "out"), lse, scale, precision)
            arguments |= {"delta": delta[branch.rows], "plain_scale": scale}
            arguments["gamma"] = x if gamma is None else gamma
            constants["GAMMA"] = gamma is not None
            queries = constants | {"ADD": not first, "RESIDUAL": first and gamma is not None}
            images, count, tokens, _ = branch.maps[0].shape
            programs = _blocks(images * count, tokens)
            run(Launch("backward_queries", arguments, queries, programs))
            found = _backward_keys(branch, arguments, constants, run)
            # One after the other, in the order of the windows: the same sum in every run.
            grad_key[branch.rows[0]] += found[..., : key.shape[-1]]
        grad_gamma.add_(delta.sum())
        return torch.empty_like(key).copy_(grad_key if gamma is None else grad_key * gamma)

    grad_column_key = differentiate(COLUMNS, column_key, column_lse, True)
    grad_row_key = differentiate(ROWS, row_key, row_lse, False)
    if gamma is None:
        return grad_x, grad_column_key, grad_row_key, x.new_empty(0)
    return grad_x, grad_column_key, grad_row_key, grad_gamma.to(gamma.dtype).reshape(gamma.shape)


def _backward_keys(
    branch: _Branch, arguments: dict[str, Any], constants: dict[str, Any], run: Run
) -> Tensor:
    """Launch `backward_keys`, and add up what its programs leave for the key's gradient."""
    images, count, tokens, features = branch.maps[0].shape
    each = slices_each(images * count, tokens)
    parts = -(-count // each)
    sums = branch.key.new_empty(images, parts, tokens, features, dtype=torch.float32)
    arguments = arguments | {"grad_key": sums, "slices_each": each}
    run(Launch("backward_keys", arguments, constants, _blocks(images * parts, tokens)))
    return sums.sum(1)
