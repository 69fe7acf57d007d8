"""What a layer costs, by formula: FLOPs, parameters, similarity maps and peak working memory.

Nothing runs: a layer on the meta device will do, and so will a feature map that fits no memory.

FLOPs are 2 for each multiplication with an addition, and products and convolutions alone are
counted, as `torch.utils.flop_counter.FlopCounterMode` does; the two agree. For x of (B, C, H, W):

    FullyAttentional   8·B·C²·HW          attention: two products in each of two branches
                       2·B·C²·(H + W)     the two Linears
                       18·B·C²·HW         the projection
    ChannelNonLocal    4·B·C²·HW
    SpatialNonLocal    2·B·HW·H'W'·(D+E)  D channels of a query, E of a value, after subsampling
                       2·B·C·N·HW         each of its 1x1 convolutions, from or to N channels

Backward, with a gradient for x, costs twice the forward where the map is kept, and half the
attention's forward more where a fused backend computes the scores again. `triton` computes more
than those again; as PyTorch does for its own fused kernels, that is not counted.

Memory is that of all tensors alive at the worst moment, over x, the parameters and the gradient
that arrives at the output: the result, copies, maps, buffers, and in training what backward needs,
the gradient of x and those of the parameters. They assume a contiguous x, a normalisation that
keeps its input and an activation that keeps its result, as BatchNorm2d and ReLU do. On a CPU with
float32 they are within a tenth of the allocations that PyTorch reports. Not counted are what BLAS
and convolutions in half precision take for themselves, the tokens that `sdpa` packs in
half precision for processors with matrix units (AMX), memory that the allocator does not give back,
and PyTorch's own records: a process grows by somewhat more. For other devices the formulas
are the same, but their libraries' room is not known and not counted.

Example:
    >>> import torch, fullattn
    >>> from fullattn import costs
    >>> layer = fullattn.FullyAttentional(512, project=False, device="meta")
    >>> cost = costs.cost(layer, (1, 512, 97, 97), backend="reference")
    >>> f"{cost.flops / 1e9:.1f} GFLOP, and {cost.backward_flops / 1e9:.1f} backward"
    '19.8 GFLOP, and 39.7 backward'
    >>> cost.parameters, cost.map_numbers  # (97 + 97) maps of 512 x 512
    (525313, 50855936)
    >>> cost.map_bytes / cost.inference_bytes > 0.4
    True
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from fullattn.attention import Kind, Problem, chunked, dispatch, flops, sdpa
from fullattn.attention.backend import FLOATING
from fullattn.attention.triton import launch
from fullattn.layers import ChannelNonLocal, FullyAttentional, SpatialNonLocal, _checks

__all__ = ["Cost", "cost"]


@dataclass(frozen=True)
class Cost:
    """What one call of a layer costs.

    Attributes:
        backend: name of the backend that the figures are for.
        parameters: numbers in the layer's parameters.
        flops: of a forward pass; 2 for each multiplication with an addition.
        backward_flops: of the backward pass, with a gradient for x, the forward not included.
        map_numbers: numbers in all similarity maps of the batch, built or not.
        map_bytes: what those maps take where they are built.
        inference_bytes: peak working memory of a forward pass without gradients, over x and the
            parameters.
        training_bytes: the same of a forward and backward pass, with a gradient for x.
    """

    backend: str
    parameters: int
    flops: int
    backward_flops: int
    map_numbers: int
    map_bytes: int
    inference_bytes: int
    training_bytes: int


def cost(
    layer: nn.Module,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    device: torch.device | str = "cpu",
) -> Cost:
    """What a layer costs on a feature map, by the formulas of this module.

    Args:
        layer: one of this package's three layers, on any device; its options are read from it.
        shape: of the feature map, (B, C, H, W).
        dtype: of the feature map and the layer.
        backend: name of the backend; None for the one that would run.
        device: where the layer would run.

    Returns:
        The cost.

    Raises:
        BackendError: the backend asked for cannot run this.
        TypeError: not one of this package's layers, or not a real floating-point dtype.
        ValueError: a shape that the layer does not take, an unknown backend, or a layer with
            `mix_images`, for which there is no formula.

    Example:
        >>> from fullattn import ChannelNonLocal
        >>> cost(ChannelNonLocal(512), (1, 512, 97, 97)).flops
        9866051584
    """
    if not isinstance(layer, (ChannelNonLocal, FullyAttentional, SpatialNonLocal)):
        raise TypeError(
            "expected a FullyAttentional, ChannelNonLocal or SpatialNonLocal, "
            f"got {type(layer).__name__}"
        )
    if dtype not in FLOATING:
        raise TypeError(f"expected a real floating-point dtype, got {dtype}")
    setting = _Setting(_checked(layer, shape), dtype, torch.device(device).type, backend)
    if getattr(layer, "mix_images", False):
        raise ValueError("expected a layer without mix_images=True, for which there is no formula")
    if isinstance(layer, FullyAttentional):
        work = _fully_attentional(layer, setting)
    elif isinstance(layer, ChannelNonLocal):
        work = _channel_non_local(layer, setting)
    else:
        work = _spatial_non_local(layer, setting)
    return Cost(
        backend=work.backend,
        parameters=_numbers(layer.parameters()),
        flops=work.flops,
        backward_flops=work.backward_flops,
        map_numbers=work.map_numbers,
        map_bytes=work.map_numbers * setting.work_size,
        inference_bytes=work.inference,
        training_bytes=work.training,
    )


def _checked(
    layer: ChannelNonLocal | FullyAttentional | SpatialNonLocal, shape: Sequence[int]
) -> tuple[int, int, int, int]:
    if len(shape) != 4:
        raise ValueError(f"expected a shape (B, {layer.channels}, H, W), got {tuple(shape)}")
    sizes = [
        _checks.positive(size, f"{axis} of shape {tuple(shape)}")
        for axis, size in zip("BCHW", shape, strict=True)
    ]
    if sizes[1] != layer.channels:
        raise ValueError(f"expected {layer.channels} channels, got shape {tuple(shape)}")
    smallest = getattr(layer, "subsample", 1)
    if min(sizes[2:]) < smallest:
        raise ValueError(
            f"subsample={smallest} expects H and W of at least {smallest}, got shape {tuple(shape)}"
        )
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _numbers(tensors: Iterable[torch.Tensor]) -> int:
    return sum(x.numel() for x in tensors)


@dataclass(frozen=True)
class _Setting:
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: str
    backend: str | None

    @property
    def size(self) -> int:
        """Bytes of a number of the feature map."""
        return self.dtype.itemsize

    @property
    def work_size(self) -> int:
        """Bytes of a number where scores and softmax are computed: float32 at least."""
        return max(4, self.size)

    def choose(self, problem: Problem, requested: str | None) -> str:
        problem = dataclasses.replace(problem, device=self.device, dtype=self.dtype)
        if self.backend is None:
            return dispatch.choose(problem, requested).name
        with dispatch.backend(self.backend):
            return dispatch.choose(problem).name


@dataclass(frozen=True)
class _Work:
    """A layer's figures that depend on the shape; memory in bytes."""

    backend: str
    flops: int
    backward_flops: int
    map_numbers: int
    inference: int
    training: int


@dataclass(frozen=True)
class _Attention:
    """One call of `fullattn.attention.attend`: query (B, S, N, D), key and value as there.

    Attributes:
        query: its shape; likewise key and value.
        kind: form of attention.
        setting: dtype and device.
        contiguous: whether the inputs are contiguous in this layout.
        in_place: whether BLAS can read every slice where it lies.
        value_is_query: whether the two are one tensor.
        scale: as `attend` gets it.
    """

    query: tuple[int, int, int, int]
    key: tuple[int, int, int, int]
    value: tuple[int, int, int, int]
    kind: Kind
    setting: _Setting
    contiguous: bool
    in_place: bool
    value_is_query: bool = False
    scale: float = 1.0

    @property
    def out(self) -> tuple[int, int, int, int]:
        return (*self.query[:3], self.value[3])

    @property
    def map_numbers(self) -> int:
        return prod(self.query[:3]) * self.key[2]

    @property
    def half(self) -> bool:
        return self.setting.size < self.setting.work_size


@dataclass(frozen=True)
class _Footprint:
    """FLOPs of one attention, and its memory in bytes over its inputs.

    Attributes:
        flops: forward.
        backward_flops: backward.
        output: what stays in memory as long as the result does.
        inference: peak of a forward pass without gradients, the output included.
        saved: what the forward pass keeps for backward besides inputs and output.
        forward: peak of a forward pass that keeps it, `saved` and output included.
        backward: peak of the backward pass, `saved`, the gradients of the inputs and that of the
            output included.
        backward_shared: the same without the gradient of the output, which others hold too.
        contiguous_grad: what backward takes besides where that gradient is not contiguous.
        keeps_inputs: whether backward needs the inputs.
        keeps_output: whether backward needs the output.
    """

    flops: int
    backward_flops: int
    output: int
    inference: int
    saved: int
    forward: int
    backward: int
    backward_shared: int
    contiguous_grad: int = 0
    keeps_inputs: bool = True
    keeps_output: bool = False

    @property
    def kept(self) -> int:
        return self.saved + (self.output if self.keeps_output else 0)


def _reference(a: _Attention) -> _Footprint:
    work = a.setting.work_size
    maps = a.map_numbers * work
    query, key, value, out = (prod(x) * work for x in (a.query, a.key, a.value, a.out))
    expanded_key = key // a.key[1] * a.query[1]
    casts = (query if a.half or a.scale != 1.0 else 0) + (key if a.half else 0)
    twice = query if a.half and a.scale != 1.0 else 0  # cast, then scaled
    value_cast = value if a.half else 0
    # Slices of several images do not merge into one axis, so the batched products copy them.
    copied = a.query[0] > 1 and a.query[1] > 1
    copies, value_copy = (query + expanded_key, value) if copied else (0, 0)
    output = prod(a.out) * a.setting.size
    output_cast = output if a.half else 0
    # Maps alive while one is built, kept for backward, and made in backward after the first.
    built, kept, made = {
        Kind.SOFTMAX: (2, 1, 2),
        Kind.DOT_PRODUCT: (2, 1, 1),
        Kind.CONCATENATION: (3, 2, 1),
    }[a.kind]
    saved_value = value_copy or value_cast
    saved = kept * maps + (copies or casts) + saved_value
    if a.kind is Kind.SOFTMAX:
        building = casts + max(twice, copies + maps, built * maps)
    else:
        building = max(casts + copies + maps, built * maps)
    grad_out = out if copied or a.half else 0
    grad_value = saved + grad_out + value + maps
    grad_others = saved - saved_value + value + max(made * maps, query + expanded_key)
    if a.kind is Kind.CONCATENATION:  # its scores are sums
        products = 2 * a.map_numbers * a.value[3]
    else:
        products = flops.attend(a.query, a.key, a.value)
    return _Footprint(
        flops=products,
        backward_flops=2 * products,
        output=output,
        inference=max(building, maps + out + max(value_cast + value_copy, output_cast)),
        saved=saved,
        forward=max(copies + building, saved + out + max(value_cast if copied else 0, output_cast)),
        backward=max(grad_value + output, grad_others),
        backward_shared=max(grad_value, grad_others),
        keeps_inputs=not a.half,  # their casts are saved
    )


def _chunked(a: _Attention) -> _Footprint:
    size, work = a.setting.size, a.setting.work_size
    plan = chunked._Plan(torch.empty(a.query, device="meta"), torch.empty(a.key, device="meta"))
    batch, slices = a.query[:2]
    group = min(plan.gathered, slices)
    # From the second group on, a tensor is there twice while it is made again.
    full_again = slices >= 2 * group or (batch > 1 and slices == group)
    again = group if full_again else slices - group
    buffer = plan.block_numbers * work

    def gathered(shape: tuple[int, int, int, int]) -> int:
        """Bytes of the copy of one slice."""
        return 0 if a.in_place and not a.half else prod(shape[2:]) * work

    query, grad = gathered(a.query), gathered(a.out)
    value = 0 if a.value_is_query else gathered(a.value)
    # Keys are cast, but never gathered: they are one slice, or lie so that BLAS reads them.
    key = prod(a.key[2:]) * work if a.half else 0
    # A cast keeps the strides, and is copied once more.
    casting = 2 if a.half and not a.contiguous else 1
    result = prod(a.out[2:]) * work
    output = prod(a.out) * size
    # The value's name holds the old query while the key is cast again.
    same = query if a.value_is_query and slices == 1 else 0
    inference = (
        output
        + buffer
        + key
        + group * (query + value + result)
        + again * max(casting * query, casting * value, result, same + key)
    )
    to_query, to_key, to_value = (prod(x[2:]) * work for x in (a.query, a.key, a.value))
    grads = (prod(a.query) + prod(a.key) + prod(a.value)) * size
    if slices == 1:
        repeated = again * (query + key + value + grad + to_query + to_key + to_value)
    else:
        repeated = again * (query + value + grad + max(to_query, to_value))
    backward = (
        grads
        + 2 * buffer
        + key
        + group * (query + value + grad + to_query + to_value)
        + to_key
        + repeated
    )
    return _Footprint(
        flops=flops.attend(a.query, a.key, a.value),
        backward_flops=flops.attend_backward(a.out, a.query, a.key, a.value),
        output=output,
        inference=inference,
        saved=0,
        forward=inference,
        backward=backward + output,
        backward_shared=backward,
    )


def _sdpa(a: _Attention) -> _Footprint:
    size = a.setting.size
    features, value_features = sdpa.padded_features(a.setting.device, a.query[3], a.value[3])
    query, key = (*a.query[:3], features), (*a.key[:3], features)
    value, out = (*a.value[:3], value_features), (*a.query[:3], value_features)
    copies = 0
    for given, taken, negated in (
        (a.query, query, a.scale < 0),
        (a.key, key, False),
        (a.value, value, False),
    ):
        if not a.contiguous or given != taken or negated:
            copies += prod(taken) * size
    output = prod(out) * size
    log_sum = prod(out[:3]) * 4
    saved = copies + log_sum
    forward_block, backward_block = _sdpa_blocks(a, value_features)
    # The fused kernel takes the key's copy as if it had all slices, and so comes its gradient.
    grads = (prod(query) + prod(a.query[:2]) * a.key[2] * (features + value_features)) * size
    padded = value_features != a.value[3]  # and so the gradient of the output is padded again
    backward = saved + grads + backward_block
    return _Footprint(
        flops=flops.attend(query, key, value),
        backward_flops=flops.attend_backward(out, query, key, value),
        output=output,
        inference=saved + output + forward_block,
        saved=saved,
        forward=saved + output + forward_block,
        backward=backward + output,
        backward_shared=backward + (output if padded else 0),
        contiguous_grad=0 if padded else output,
        keeps_inputs=not copies,
        keeps_output=True,
    )


def _sdpa_blocks(a: _Attention, value_features: int) -> tuple[int, int]:
    """Buffers of the CPU kernel, forward and backward: blocks of the map, one set a thread."""
    if a.setting.device != "cpu":
        return 0, 0
    tokens, memory = a.query[2], a.key[2]
    rows = min(tokens, 256 if tokens >= 768 else 64 if tokens >= 192 else 32)
    columns = min(memory, 512)
    block = rows * columns * (a.setting.work_size + (a.setting.size if a.half else 0))
    rest = rows * (2 + value_features) * a.setting.work_size
    threads = torch.get_num_threads()
    return threads * (block + rest), threads * 2 * block


def _reassociated(a: _Attention) -> _Footprint:
    size, work = a.setting.size, a.setting.work_size
    query, key, value = (prod(x) * work for x in (a.query, a.key, a.value))
    query_cast, other_casts = (query, key + value) if a.half else (0, 0)
    casts = query_cast + other_casts
    context = a.query[0] * a.query[3] * a.value[3] * work
    output = prod(a.out) * size
    output_work = prod(a.out) * work
    output_cast = output if a.half else 0
    products = 2 * a.query[0] * a.query[3] * a.value[3] * (a.query[2] + a.key[2])
    backward = casts + 3 * context + query + key + value + (output_work if a.half else 0)
    return _Footprint(
        flops=products,
        backward_flops=2 * products,
        output=output,
        inference=max(
            other_casts + context,
            2 * context,
            context + output_work + max(query_cast, output_cast),
        ),
        saved=casts + context,
        forward=casts + context + max(context, output_work + output_cast),
        backward=backward + output,
        backward_shared=backward,
        keeps_inputs=not a.half,  # their casts are saved
    )


_ATTENTION: dict[str, Callable[[_Attention], _Footprint]] = {
    "reference": _reference,
    "chunked": _chunked,
    "sdpa": _sdpa,
    "reassociated": _reassociated,
}


def _native(setting: _Setting) -> _Footprint:
    """Both branches of FullyAttentional in one pass, by `attention/native.c`."""
    shape, size = setting.shape, setting.size
    x = prod(shape) * size
    casts = prod(shape) * 4 if size < 4 else 0
    forward_room, backward_room = _native_rooms(shape)
    return _Footprint(
        flops=flops.columns_and_rows(shape),
        backward_flops=flops.columns_and_rows_backward(shape, shape),
        output=x,
        inference=x + 2 * casts + forward_room,
        saved=0,
        forward=x + 2 * casts + forward_room,
        backward=2 * x + 3 * casts + backward_room,
        backward_shared=x + 3 * casts + backward_room,
    )


def _native_rooms(shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """What the kernel allocates for itself, forward and backward.

    The keys; in each thread 16 columns at a time with their result and a block of the map; backward
    also the columns' gradient, three more blocks, and a share of the keys' gradients for each image
    and thread.
    """
    batch, channels, height, width = shape
    threads = torch.get_num_threads()
    row = -(-channels // 32) * 32 + 16
    columns = min(16, width, -(-batch * width // threads))
    keys = row * (height + width)
    forward = max(columns * height, width) * 2 + 32
    backward = max(columns * height, width) * 3 + 2 * (32 + 64)
    return (
        4 * (batch * keys + threads * row * forward),
        4 * ((2 * batch + threads) * keys + threads * row * backward),
    )


def _triton(setting: _Setting) -> _Footprint:
    """Both branches of FullyAttentional and its residual, by `attention/triton`."""
    batch, channels, height, width = shape = setting.shape
    x = prod(shape) * setting.size
    rows = 4 * batch * channels * (height + width)  # a number for each row of each map
    forward, backward = zip(
        _triton_room((batch, width, channels, height), setting.size, in_place=False),
        _triton_room((batch, height, channels, width), setting.size, in_place=width % 16 == 0),
        strict=True,
    )
    grad_keys = batch * channels * (height + width) * (4 + setting.size)
    return _Footprint(
        flops=flops.columns_and_rows(shape),
        backward_flops=flops.columns_and_rows_backward(shape, shape),
        output=x,
        inference=x + rows + max(forward),
        saved=rows,
        forward=x + rows + max(forward),
        backward=2 * x + 2 * rows + grad_keys + max(backward),
        backward_shared=x + 2 * rows + grad_keys + max(backward),
    )


def _triton_room(
    slices: tuple[int, int, int, int], size: int, *, in_place: bool
) -> tuple[int, int]:
    """What one branch takes besides, forward and backward.

    Windows of x and the result, backward of the gradient too, and a readable key, where slices are
    not read in place; backward the sums for the key's gradient that the programs leave.
    """
    batch, count, channels, features = slices
    images, width = batch, count
    windows = key = 0
    if not in_place:
        images, width = launch.window(slices, size)
        features = launch.padded(features)
        windows = images * width * channels * features * size
        key = batch * channels * features * size
    parts = -(-width // launch.slices_each(images * width, channels))
    sums = 4 * images * (parts + 1) * channels * features
    return 2 * windows + key, 3 * windows + key + sums


_COLUMNS_AND_ROWS: dict[str, Callable[[_Setting], _Footprint]] = {
    "native": _native,
    "triton": _triton,
}


def _fully_attentional(layer: FullyAttentional, setting: _Setting) -> _Work:
    batch, channels, height, width = setting.shape
    problem = Problem.of_columns_and_rows(torch.empty(setting.shape, device="meta"))
    backend = setting.choose(problem, layer.backend)
    scale = 1.0 if layer.scale is None else layer.scale
    if backend in _COLUMNS_AND_ROWS:
        branches = [_COLUMNS_AND_ROWS[backend](setting)]
    else:
        slices = ((batch, width, channels, height), (batch, height, channels, width))
        branches = [
            _ATTENTION[backend](
                _Attention(
                    query=query,
                    key=(query[0], 1, *query[2:]),
                    value=query,
                    kind=Kind.SOFTMAX,
                    setting=setting,
                    contiguous=False,
                    in_place=query is slices[1],  # a contiguous map's rows are matrices in it
                    value_is_query=True,
                    scale=scale,
                )
            )
            for query in slices
        ]
    linears = 2 * batch * channels**2 * (height + width)
    convolution = 0 if layer.project is None else 18 * channels * prod(setting.shape)
    return _Work(
        backend=backend,
        flops=sum(branch.flops for branch in branches) + linears + convolution,
        backward_flops=sum(branch.backward_flops for branch in branches)
        + 2 * (linears + convolution),
        map_numbers=batch * problem.map_numbers,
        inference=max(_fully_attentional_inference(layer, setting, branches)),
        training=max(
            _fully_attentional_training(
                layer, setting, branches, dispatch.by_name(backend).adds_residual
            )
        ),
    )


def _projection_room(weights: int, setting: _Setting) -> tuple[int, int]:
    """What the 3x3 convolution needs besides its results, forward and backward.

    In float64 the neighbourhood of every position, otherwise copies in oneDNN's own layout.
    """
    x = prod(setting.shape) * setting.size
    return (9 * x, 9 * x) if setting.dtype == torch.float64 else (x + weights, 2 * x)


def _fully_attentional_inference(
    layer: FullyAttentional, setting: _Setting, branches: list[_Footprint]
) -> Iterator[int]:
    """Bytes alive at each step of a forward pass without gradients."""
    batch, channels, height, width = setting.shape
    x = prod(setting.shape) * setting.size
    keys = batch * channels * (height + width) * setting.size
    done = 0
    for branch in branches:
        yield keys + done + branch.inference
        done += branch.output
    if len(branches) > 1:
        yield keys + done + x  # their sum
    if layer.project is not None:
        weights = _numbers(layer.project.parameters()) * setting.size
        yield 2 * x + _projection_room(weights, setting)[0]
        # Input and result of a later step, while the caller holds the projection's input.
        yield min(3, 1 + len(layer.project)) * x


def _fully_attentional_training(
    layer: FullyAttentional, setting: _Setting, branches: list[_Footprint], adds_residual: bool
) -> Iterator[int]:
    """Bytes alive at each step of a forward and backward pass."""
    batch, channels, height, width = setting.shape
    x = prod(setting.shape) * setting.size
    keys = batch * channels * (height + width) * setting.size
    kept = keys * (3 if layer.scale is None else 2)  # contexts, keys and scaled keys
    for branch in branches:
        yield kept + branch.forward
        kept += branch.kept
    if len(branches) > 1:
        yield kept + sum(branch.output for branch in branches if not branch.keeps_output) + x
    attended, result = 0 if adds_residual else x, x
    # The gradient of the sum with x; without a projection it is the one that arrives.
    grad_sum = weights = 0
    if layer.project is not None:
        later = len(layer.project) - 1  # steps after the convolution
        convolved = x if hasattr(layer.project, "norm") else 0  # which a normalisation keeps
        weights = _numbers(layer.project.parameters()) * setting.size
        room, room_backward = _projection_room(weights, setting)
        grad_sum = summed = x
        held = kept + attended + summed
        yield held + max((1 + later) * x, x + room)
        yield held + result + convolved + later * x
        yield held + result + (x if later else 0) + grad_sum + weights + room_backward
    held = result + grad_sum + weights
    if not adds_residual:
        yield kept + attended + held + 2 * x  # gradients of the attended values and of gamma
    for branch in reversed(branches):
        # The gradient of the attended values stays until both branches have had it.
        last = branch is branches[0]
        grad = 0 if adds_residual else x  # the residual's gradient is the one that arrives
        peak = branch.backward if last and grad else grad + branch.backward_shared
        yield kept - branch.saved + held + peak
        kept -= branch.kept
        held += x  # the branch's gradient of x
    linears = 2 * _numbers(layer.column_key.parameters()) * setting.size
    yield kept + held + linears + x  # the gradient through a mean


def _channel_non_local(layer: ChannelNonLocal, setting: _Setting) -> _Work:
    batch, channels, height, width = setting.shape
    tokens = (batch, 1, channels, height * width)
    scale = 1.0 if layer.scale is None else layer.scale
    problem = _problem(Kind.SOFTMAX, tokens, tokens)
    backend = setting.choose(problem, layer.backend)
    attention = _ATTENTION[backend](
        _Attention(
            query=tokens,
            key=tokens,
            value=tokens,
            kind=Kind.SOFTMAX,
            setting=setting,
            contiguous=True,
            in_place=True,
            value_is_query=True,
            scale=-scale if layer.least_similar else scale,
        )
    )
    x = prod(setting.shape) * setting.size
    key = x if layer.scale is None else 0
    kept_key = key if attention.keeps_inputs else 0
    kept = kept_key + attention.saved
    attended, result = attention.output, x
    return _Work(
        backend=backend,
        flops=attention.flops,
        backward_flops=attention.backward_flops,
        map_numbers=batch * problem.map_numbers,
        inference=key + attention.inference,  # the result takes the place of the attended values
        training=max(
            key + attention.forward,
            kept + attended + result + 2 * x,  # the sum with x, backward
            result + kept_key + (attended if attention.keeps_output else 0) + attention.backward,
            result + 4 * x,  # gradients of query, key and value, and their sum
        ),
    )


def _spatial_non_local(layer: SpatialNonLocal, setting: _Setting) -> _Work:
    batch, channels, height, width = setting.shape
    size, inner = setting.size, layer.inner_channels
    projected = layer.output is not None
    value = inner if projected else channels
    step = layer.subsample
    positions, memory = height * width, (height // step) * (width // step)
    embedded = layer.query is not None
    features = inner if embedded else channels
    scored = layer.score is not None
    tokens = 1 if scored else features
    query, key = (batch, 1, positions, tokens), (batch, 1, memory, tokens)
    kind = layer._kind
    problem = _problem(kind, query, key)
    backend = setting.choose(problem, layer.backend)
    attention = _ATTENTION[backend](
        _Attention(
            query=query,
            key=key,
            value=(batch, 1, memory, value),
            kind=kind,
            setting=setting,
            contiguous=False,
            in_place=True,
            scale=1.0 if layer.scale is None else layer.scale,
        )
    )
    convolved = (2 * inner if embedded else 0) + value + (inner if projected else 0)
    convolutions = 2 * batch * channels * positions * convolved
    scores = 2 * batch * inner * (positions + memory) if scored else 0

    x = prod(setting.shape) * size
    full, pooled = batch * positions * size, batch * memory * size
    indices = batch * memory * 8
    queries = inner * full if embedded else 0
    if step > 1:
        keys, values = features * pooled, value * pooled
        # Pooling keeps its input and where the largest numbers were.
        pooling = (inner * full if embedded else 0) + features * indices
        pooling += value * (full + indices)
        pool_peak = queries + keys + values + value * (full + indices)
    else:
        keys, values = (inner * full if embedded else 0), value * full
        pooling = pool_peak = 0
    scaled = features * pooled if layer.scale is None and not scored else 0
    inputs = queries + keys + values + scaled
    attended, result = attention.output, x
    kept_inputs = inputs if attention.keeps_inputs else 0
    kept = pooling + kept_inputs + attention.saved
    held = pooling + kept_inputs + (attended if attention.keeps_output else 0) + result
    grads = (features * full if embedded else 0) + (features + value) * pooled
    weights = channels * inner * size
    ending: tuple[int, ...]  # the steps after the attention, and backward
    if projected:
        normalised = x if hasattr(layer.output, "norm") else 0
        ending = (
            kept + attended + 2 * x + normalised,  # output, normalised, sum with x
            kept + attended + x + 2 * normalised,  # normalisation, backward
            kept + attended + result + normalised + inner * full + weights,
            held + weights + attention.backward,
            pooling + result + grads + 2 * x + 4 * weights,  # convolutions, backward
        )
    else:
        ending = (
            kept + attended + result + 2 * x,  # gradients of the attended values and of gamma
            # That of the attended values lies as the one that arrives does, in maps.
            held + attention.backward + attention.contiguous_grad,
            pooling + result + grads + 2 * x + 2 * weights + channels * channels * size,
        )
    return _Work(
        backend=backend,
        flops=attention.flops + convolutions + scores,
        backward_flops=attention.backward_flops + 2 * (convolutions + scores),
        map_numbers=batch * problem.map_numbers,
        inference=max(
            pool_peak, inputs + attention.inference, attended + (2 if projected else 1) * x
        ),
        training=max(pooling + inputs + attention.forward, *ending),
    )


def _problem(kind: Kind, query: Sequence[int], key: Sequence[int]) -> Problem:
    return Problem.of(kind, torch.empty(query, device="meta"), torch.empty(key, device="meta"))
