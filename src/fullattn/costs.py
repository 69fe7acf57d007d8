"""What a layer costs, by formula: FLOPs, parameters, similarity maps and peak working memory.

Nothing runs: a layer on the meta device will do, and so will a feature map that fits no memory.

FLOPs are 2 for each multiplication with an addition, and products and convolutions alone are
counted, as `torch.utils.flop_counter.FlopCounterMode` does; the two agree. For x of (B, C, H, W):

    FullyAttentional   8·B·C²·HW          attention: two products in each of two branches
                       2·B·C²·(H + W)     the two Linears
                       18·B·C²·HW         the projection
    ChannelNonLocal    4·B·C²·HW
    SpatialNonLocal    2·B·HW·H'W'·(D+E)  D channels of a query, E of a value, after subsampling
                       2·B·C·E·HW         each of its 1x1 convolutions

Backward, with a gradient for x, costs twice the forward where the map is kept, and half the
attention's forward more where a fused backend computes the scores again.

Memory is that of all tensors alive at the worst moment, over x, the parameters and the gradient
that arrives at the output: the result, copies, maps, buffers, and in training what backward needs,
the gradient of x and those of the parameters. Contiguous x, batch statistics or none, and an
activation that keeps nothing but its result, as ReLU does, are assumed. Not counted: what
libraries allocate for themselves (BLAS, oneDNN, cuDNN, a compiler's runtime), the allocator's
rounding, and PyTorch's own records. The figures for "cpu" are tested against the allocations that
PyTorch reports; those for other devices are the same formulas, and less certain.

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from fullattn.attention import Kind, Problem, chunked, dispatch, flops, sdpa
from fullattn.attention.backend import FLOATING
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
        ValueError: a shape that the layer does not take, or an unknown backend.

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


# ---------------------------------------------------------------- attention


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
    keeps_inputs: bool = True
    keeps_output: bool = False

    @property
    def kept(self) -> int:
        return self.saved + (self.output if self.keeps_output else 0)


def _reference(a: _Attention) -> _Footprint:
    size, work = a.setting.size, a.setting.work_size
    maps = a.map_numbers * work
    expanded_key = prod(a.query[:2]) * prod(a.key[2:])
    # The batched product of strided slices wants them copied, as soon as there are two images.
    copies = not a.in_place and a.query[0] > 1 or a.query[1] > 1 and a.query[0] > 1
    query_cast = prod(a.query) * work if a.half or a.scale != 1.0 else 0
    key_cast, value_cast = ((prod(x) * work if a.half else 0) for x in (a.key, a.value))
    copied_key = (prod(a.query) + expanded_key) * work if copies else 0
    copied_value = prod(a.value) * work if copies else 0
    value = copied_value if copies else value_cast
    output = prod(a.out) * size
    output_work = prod(a.out) * work + (output if a.half else 0)
    # Maps alive while the map is built, kept for backward, and alive in backward besides those.
    built, kept, more = {
        Kind.SOFTMAX: (2, 1, 2),
        Kind.DOT_PRODUCT: (2, 1, 1),
        Kind.CONCATENATION: (3, 2, 1),
    }[a.kind]
    saved = kept * maps + (copied_key or query_cast + key_cast) + value
    grad_query, grad_key, grad_value = (
        n * work for n in (prod(a.query), expanded_key, prod(a.value))
    )
    copied_grad = prod(a.out) * work if copies or a.half else 0
    if a.kind is Kind.CONCATENATION:
        products = 2 * a.map_numbers * a.value[3]
    else:
        products = flops.attend(a.query, a.key, a.value)
    to_value = saved + copied_grad + grad_value + maps
    to_others = saved - value + grad_value + max(more * maps, grad_query + grad_key)
    return _Footprint(
        flops=products,
        backward_flops=2 * products,
        output=output,
        inference=max(
            query_cast + key_cast + max(copied_key + maps, built * maps),
            maps + value_cast + copied_value + output_work,
        ),
        saved=saved,
        forward=max(
            query_cast + key_cast + copied_key + built * maps,
            saved + (value_cast if copies else 0) + output_work,
        ),
        backward=max(to_value + output, to_others),
        backward_shared=max(to_value, to_others),
    )


def _chunked(a: _Attention) -> _Footprint:
    size, work = a.setting.size, a.setting.work_size
    plan = chunked._Plan(torch.empty(a.query, device="meta"), torch.empty(a.key, device="meta"))
    batch, slices = a.query[:2]
    group = min(plan.gathered, slices)
    # From the second group on, a tensor is there twice while it is made again.
    if slices >= 2 * group or (batch > 1 and slices == group):
        again = group
    else:
        again = slices - group
    buffer = plan.block_numbers * work

    def gathered(shape: tuple[int, int, int, int]) -> int:
        """Bytes of one slice of a copy; the group has one slice of a shared tensor."""
        return 0 if a.in_place and not a.half else prod(shape[2:]) * work

    query, grad = gathered(a.query), gathered(a.out)
    value = 0 if a.value_is_query else gathered(a.value)
    shared_key = prod(a.key[2:]) * work if a.half else 0
    result = prod(a.out[2:]) * work
    output = prod(a.out) * size
    inference = (
        output
        + buffer
        + shared_key
        + group * (query + value + result)
        + again * max(query, value, result)
    )
    to_query, to_key, to_value = (prod(x[2:]) * work for x in (a.query, a.key, a.value))
    grads = (prod(a.query) + prod(a.key) + prod(a.value)) * size
    if slices == 1:
        repeated = again * (query + value + grad + to_query + to_key + to_value)
    else:
        repeated = again * (query + value + grad + max(to_query, to_value))
    backward = (
        grads
        + 2 * buffer
        + shared_key
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
    size, work = a.setting.size, a.setting.work_size
    features, value_features = sdpa.padded_features(a.setting.device, a.query[3], a.value[3])
    query, key = (*a.query[:3], features), (*a.key[:3], features)
    value, out = (*a.value[:3], value_features), (*a.query[:3], value_features)
    copies = 0
    for given, padded, changed in (
        (a.query, query, a.scale < 0),
        (a.key, key, False),
        (a.value, value, False),
    ):
        if not a.contiguous or given != padded or changed:
            copies += prod(padded) * size
    output = prod(out) * size
    log_sum = prod(out[:3]) * 4
    saved = copies + log_sum
    forward_block, backward_block = _sdpa_blocks(a, value_features)
    # The fused kernel takes the key's copy as if it had all slices, and so comes its gradient.
    grads = (prod(query) + prod(a.query[:2]) * a.key[2] * (features + value_features)) * size
    backward = saved + grads + backward_block
    padded = value_features != a.value[3]  # and so the gradient of the output is padded again
    return _Footprint(
        flops=flops.attend(query, key, value),
        backward_flops=flops.attend_backward(out, query, key, value),
        output=output,
        inference=saved + output + forward_block,
        saved=saved,
        forward=saved + output + forward_block,
        backward=backward + output,
        backward_shared=backward + (output if padded else 0),
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
    number = a.setting.work_size * torch.get_num_threads()
    return rows * (columns + 2 + value_features) * number, 2 * rows * columns * number


def _reassociated(a: _Attention) -> _Footprint:
    size, work = a.setting.size, a.setting.work_size
    inputs = (prod(a.query) + prod(a.key) + prod(a.value)) * work
    casts = inputs if a.half else 0
    context = a.query[0] * a.query[3] * a.value[3] * work
    output = prod(a.out) * size
    output_work = prod(a.out) * work + (output if a.half else 0)
    products = 2 * a.query[0] * a.query[3] * a.value[3] * (a.query[2] + a.key[2])
    backward = casts + 3 * context + inputs + (prod(a.out) * work if a.half else 0)
    return _Footprint(
        flops=products,
        backward_flops=2 * products,
        output=output,
        inference=casts + 2 * context + output_work,
        saved=casts + context,
        forward=casts + 2 * context + output_work,
        backward=backward + output,
        backward_shared=backward,
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
    """What the kernel allocates for itself: 16 columns at a time in each thread, their result, and
    backward their gradient, a block of the map both ways round and a share of the key's gradient.
    """
    _, channels, height, width = shape
    threads = torch.get_num_threads()
    row = -(-channels // 32) * 32 + 16
    columns = min(16, -(-width // threads))
    keys = row * (height + width)
    forward = max(columns * height, width) * 2 + 32
    backward = max(columns * height, width) * 3 + 2 * (32 + 64)
    return 4 * (keys + threads * row * forward), 4 * (keys + threads * (row * backward + keys))


# ---------------------------------------------------------------- layers


def _fully_attentional(layer: FullyAttentional, setting: _Setting) -> _Work:
    batch, channels, height, width = setting.shape
    problem = Problem.of_columns_and_rows(torch.empty(setting.shape, device="meta"))
    backend = setting.choose(problem, layer.backend)
    scale = 1.0 if layer.scale is None else layer.scale
    if backend == "native":
        branches = [_native(setting)]
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
    x = prod(setting.shape) * setting.size
    keys = batch * channels * (height + width) * setting.size
    linears = 2 * batch * channels**2 * (height + width)
    project = layer.project
    convolution = 18 * channels * prod(setting.shape) if project is not None else 0
    attention_flops = sum(branch.flops for branch in branches)
    attention_backward = sum(branch.backward_flops for branch in branches)

    # Branches run one after the other, and backward in the other order.
    weights = 0 if project is None else _numbers(project.parameters()) * setting.size
    inference = [keys + 2 * x]  # the attended values, and their sum with x
    done = 0
    for branch in branches:
        inference.append(keys + done + branch.inference)
        done += branch.output
    if len(branches) > 1:
        inference.append(keys + done + x)
    if project is not None:
        # oneDNN copies input and weights into its own layout.
        inference.append(3 * x + weights)

    kept = keys * (2 if layer.scale == 1.0 else 3)  # contexts and keys
    training = []
    for branch in branches:
        training.append(kept + branch.forward)
        kept += branch.kept
    if len(branches) > 1:
        training.append(kept + sum(b.output for b in branches if not b.keeps_output) + x)
    attended, result = x, x
    grad = 0  # of the sum with x; what arrives at the layer's output is not counted
    parameter_grads = 0
    if project is not None:
        normalised = hasattr(project, "norm")
        steps = len(project) - 1
        summed = x
        training.append(kept + attended + summed + max(len(project) * x, 2 * x + weights))
        held = kept + attended + summed + result
        training.append(held + (x if normalised else 0) + steps * x)
        parameter_grads = weights
        training.append(held + (x if steps else 0) + 3 * x + weights)
        grad = x
    held = result + grad + parameter_grads
    training.append(kept + attended + held + 2 * x)
    for branch in reversed(branches):
        # The gradient of the attended values stays until both branches have had it.
        last = branch is branches[0]
        backward = branch.backward if last else x + branch.backward_shared
        training.append(kept - branch.saved + held + backward)
        kept -= branch.kept
        held += x
    training.append(kept + held + x + _numbers(layer.column_key.parameters()) * 2 * setting.size)
    return _Work(
        backend=backend,
        flops=attention_flops + linears + convolution,
        backward_flops=attention_backward + 2 * (linears + convolution),
        map_numbers=batch * problem.map_numbers,
        inference=max(inference),
        training=max(training),
    )


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
    kept = key + attention.saved
    attended, result = attention.output, x
    return _Work(
        backend=backend,
        flops=attention.flops,
        backward_flops=attention.backward_flops,
        map_numbers=batch * problem.map_numbers,
        inference=key + max(attention.inference, attended + result),
        training=max(
            key + attention.forward,
            kept + attended + result + 2 * x,  # the sum with x, backward
            result + key + (attended if attention.keeps_output else 0) + attention.backward,
            result + 4 * x,  # gradients of query, key and value, and their sum
        ),
    )


def _spatial_non_local(layer: SpatialNonLocal, setting: _Setting) -> _Work:
    batch, channels, height, width = setting.shape
    size, inner = setting.size, layer.inner_channels
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
            value=(batch, 1, memory, inner),
            kind=kind,
            setting=setting,
            contiguous=False,
            in_place=True,
            scale=1.0 if layer.scale is None else layer.scale,
        )
    )
    convolutions = 2 * batch * channels * inner * positions * (4 if embedded else 2)
    scores = 2 * batch * inner * (positions + memory) if scored else 0

    x = prod(setting.shape) * size
    full, pooled = batch * positions * size, batch * memory * size
    indices = batch * memory * 8
    queries = inner * full if embedded else 0
    if step > 1:
        keys, values = features * pooled, inner * pooled
        # Pooling keeps its input and where the largest numbers were.
        pooling = (inner * full if embedded else 0) + features * indices
        pooling += inner * (full + indices)
        pool_peak = queries + keys + values + inner * (full + indices)
    else:
        keys, values = (inner * full if embedded else 0), inner * full
        pooling = pool_peak = 0
    scaled = features * pooled if layer.scale is None and not scored else 0
    inputs = queries + keys + values + scaled
    attended, result = attention.output, x
    normalised = hasattr(layer.output, "norm")
    kept_inputs = inputs if attention.keeps_inputs else 0
    kept = pooling + kept_inputs + attention.saved
    values_out = inner * full
    grads = (features * full if embedded else 0) + (features + inner) * pooled
    weights = channels * inner * size
    return _Work(
        backend=backend,
        flops=attention.flops + convolutions + scores,
        backward_flops=attention.backward_flops + 2 * (convolutions + scores),
        map_numbers=batch * problem.map_numbers,
        inference=max(pool_peak, inputs + attention.inference, attended + 2 * x),
        training=max(
            pooling + inputs + attention.forward,
            kept + attended + (3 if normalised else 2) * x,  # output, normalised, sum with x
            kept + attended + (3 if normalised else 1) * x,  # normalisation, backward
            kept + attended + result + (x if normalised else 0) + values_out + weights,
            pooling
            + kept_inputs
            + (attended if attention.keeps_output else 0)
            + result
            + weights
            + attention.backward,
            pooling + result + grads + 2 * x + 4 * weights,  # convolutions, backward
        ),
    )


def _problem(kind: Kind, query: Sequence[int], key: Sequence[int]) -> Problem:
    return Problem.of(kind, torch.empty(query, device="meta"), torch.empty(key, device="meta"))
