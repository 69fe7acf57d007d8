"""The kernels: attention over the slices of a feature map, forward and backward, in Triton.

A slice is a column or a row of the feature map: C tokens (the channels) of D features (H or W
numbers). Which of the two it is, and how it lies in memory, is all in the strides. Query and value
are the slice itself; the key (C, D) is shared by all slices of an image.

The features are cut into at most three pieces of a power of two each, because Triton's blocks have
sizes of a power of two: 97 is read as 64 + 32 + 16, and not as 128. A tile of tokens is a tuple of
its pieces.

Scores, softmax and all sums are float32; products take the tensor cores in the dtype of the input.
Softmax is taken in base 2: `scale` has the factor log2(e) already. No kernel uses atomics.

Arguments: `S`, `C`, `D` are the numbers of slices, tokens and features; `_b _s _t _f` a tensor's
strides over batch, slices, tokens and features; `lse` and `delta` (B, S, C) are contiguous but for
their batch. CHANNELS, FEATURES and LAYOUT say nothing to a kernel: they are what its configuration
is chosen by. UNIT is a power of two that divides C; COVERS_C and COVERS_D: the blocks of tokens,
and the pieces, end where C and D do.
"""

# Triton reads annotations and names in a kernel itself, and its functions have no types.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["backward_keys", "backward_queries", "copy", "forward", "pieces"]


@triton.constexpr_function
def pieces(padded, exact):
    """Powers of two that cover a number of features: up to three with `exact`, otherwise one."""
    if not exact:
        return (1 << (padded - 1).bit_length(),)
    while padded.bit_count() > 3:
        padded += padded & -padded
    return tuple(1 << bit for bit in reversed(range(padded.bit_length())) if padded >> bit & 1)


@triton.constexpr_function
def _count(pieces):
    return len(pieces)


@triton.constexpr_function
def _width(pieces, n):
    return pieces[n]


@triton.constexpr_function
def _start(pieces, n):
    return sum(pieces[:n])


@triton.constexpr_function
def _covers_c(unit, own, others):
    return unit % own == 0 and unit % others == 0


@triton.constexpr_function
def _covers_d(pieces, padded, covers_padded):
    return covers_padded and sum(pieces) == padded


@triton.jit
def _tokens(first, N: tl.constexpr, WIDE: tl.constexpr):
    """`N` tokens from `first` on; WIDE where an offset inside of a slice may need 64 bits."""
    tokens = first + tl.arange(0, N)
    if WIDE:
        tokens = tokens.to(tl.int64)
    return tokens


@triton.jit
def _load(
    start, tokens, stride_t, stride_f, C, D,
    PIECES: tl.constexpr, COVERS_C: tl.constexpr, COVERS_D: tl.constexpr,
):  # fmt: skip
    """The tile of some tokens (N, D): a tuple of its pieces, 0 outside of C tokens, D features."""
    tile = ()
    for n in tl.static_range(_count(PIECES)):
        features = _start(PIECES, n) + tl.arange(0, _width(PIECES, n))
        place = start + tokens[:, None] * stride_t + features[None, :] * stride_f
        if COVERS_C and COVERS_D:
            piece = tl.load(place)
        elif COVERS_C:
            piece = tl.load(place, mask=features[None, :] < D, other=0.0)
        elif COVERS_D:
            piece = tl.load(place, mask=tokens[:, None] < C, other=0.0)
        else:
            inside = (tokens[:, None] < C) & (features[None, :] < D)
            piece = tl.load(place, mask=inside, other=0.0)
        tile = tile + (piece,)
    return tile


@triton.jit
def _zeros(N: tl.constexpr, PIECES: tl.constexpr):
    tile = ()
    for n in tl.static_range(_count(PIECES)):
        tile = tile + (tl.zeros([N, _width(PIECES, n)], tl.float32),)
    return tile


@triton.jit
def _scores(left, right, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """Left (N, D) · rightᵀ (D, M), in float32."""
    scores = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    for n in tl.static_range(1, _count(PIECES)):
        scores = tl.dot(left[n], tl.trans(right[n]), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _add_product(total, weights, right, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """Total + weights (N, M) · right (M, D)."""
    weights = weights.to(right[0].dtype)
    result = ()
    for n in tl.static_range(_count(PIECES)):
        result = result + (tl.dot(weights, right[n], total[n], input_precision=PRECISION),)
    return result


@triton.jit
def _scaled(tile, factor, PIECES: tl.constexpr):
    result = ()
    for n in tl.static_range(_count(PIECES)):
        result = result + (tile[n] * factor,)
    return result


@triton.jit
def forward(
    x, key, gamma, out, lse,
    S, C, D, scale,
    x_b, x_s, x_t, x_f,
    key_b, key_t, key_f,
    out_b, out_s, out_t, out_f,
    lse_b,
    CHANNELS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
    UNIT: tl.constexpr, PADDED: tl.constexpr, COVERS_PADDED: tl.constexpr,
    ADD: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: `OWN` tokens of one slice, as queries, against all of them.

    Writes softmax(x · keyᵀ) · x, added to what is in `out` with ADD; with RESIDUAL that sum times
    gamma plus x. Writes log2 Σ 2^score of every row of the map to `lse`.
    """
    PIECES: tl.constexpr = pieces(PADDED, EXACT)
    COVERS_C: tl.constexpr = _covers_c(UNIT, OWN, OTHERS)
    COVERS_D: tl.constexpr = _covers_d(PIECES, PADDED, COVERS_PADDED)
    blocks = tl.cdiv(C, OWN)
    # The blocks of a slice are neighbours: they read the same values.
    number = tl.program_id(0) // blocks
    image = (number // S).to(tl.int64)
    s = (number % S).to(tl.int64)
    x += image * x_b + s * x_s
    key += image * key_b
    out += image * out_b + s * out_s
    lse += image * lse_b + s * C

    i = _tokens((tl.program_id(0) % blocks) * OWN, OWN, WIDE)
    query = _load(x, i, x_t, x_f, C, D, PIECES, COVERS_C, COVERS_D)
    total = _zeros(OWN, PIECES)
    largest = tl.full([OWN], float("-inf"), tl.float32)
    weight = tl.zeros([OWN], tl.float32)
    for first in range(0, C, OTHERS):
        j = _tokens(first, OTHERS, WIDE)
        keys = _load(key, j, key_t, key_f, C, D, PIECES, COVERS_C, COVERS_D)
        values = _load(x, j, x_t, x_f, C, D, PIECES, COVERS_C, COVERS_D)
        scores = _scores(query, keys, PIECES, PRECISION) * scale
        if not COVERS_C:
            scores = tl.where(j[None, :] < C, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        weight = weight * shrink + tl.sum(weights, 1)
        total = _scaled(total, shrink[:, None], PIECES)
        total = _add_product(total, weights, values, PIECES, PRECISION)
        largest = larger

    if RESIDUAL:
        # Read again: kept through the loop, it would take registers from the sums.
        query = _load(x, i, x_t, x_f, C, D, PIECES, COVERS_C, COVERS_D)
        factor = tl.load(gamma).to(tl.float32)
    for n in tl.static_range(_count(PIECES)):
        features = _start(PIECES, n) + tl.arange(0, _width(PIECES, n))
        place = out + i[:, None] * out_t + features[None, :] * out_f
        inside = (i[:, None] < C) & (features[None, :] < D)
        result = total[n] / weight[:, None]
        if ADD:
            result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            result = result * factor + query[n].to(tl.float32)
        tl.store(place, result.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + i, largest + tl.log2(weight), mask=i < C)


@triton.jit
def backward_queries(
    x, key, grad, lse, gamma, out, delta,
    S, C, D, scale, plain_scale,
    x_b, x_s, x_t, x_f,
    key_b, key_t, key_f,
    grad_b, grad_s, grad_t, grad_f,
    out_b, out_s, out_t, out_f,
    lse_b,
    CHANNELS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
    UNIT: tl.constexpr, PADDED: tl.constexpr, COVERS_PADDED: tl.constexpr,
    ADD: tl.constexpr, GAMMA: tl.constexpr, RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of `OWN` tokens of one slice in their part as queries.

    Writes it to `out`: times gamma with GAMMA, added to what is there with ADD, plus the gradient
    itself, which the residual hands on, with RESIDUAL. Writes δᵢ = Σⱼ Aᵢⱼ (gradᵢ · xⱼ), which is
    gradᵢ · resultᵢ, to `delta`: taken from the map and not from the result, so that neither
    branch's result has to be kept.
    """
    PIECES: tl.constexpr = pieces(PADDED, EXACT)
    COVERS_C: tl.constexpr = _covers_c(UNIT, OWN, OTHERS)
    COVERS_D: tl.constexpr = _covers_d(PIECES, PADDED, COVERS_PADDED)
    blocks = tl.cdiv(C, OWN)
    number = tl.program_id(0) // blocks
    image = (number // S).to(tl.int64)
    s = (number % S).to(tl.int64)
    x += image * x_b + s * x_s
    key += image * key_b
    grad += image * grad_b + s * grad_s
    out += image * out_b + s * out_s
    rows = image * lse_b + s * C

    i = _tokens((tl.program_id(0) % blocks) * OWN, OWN, WIDE)
    query = _load(x, i, x_t, x_f, C, D, PIECES, COVERS_C, COVERS_D)
    grads = _load(grad, i, grad_t, grad_f, C, D, PIECES, COVERS_C, COVERS_D)
    level = tl.load(lse + rows + i, mask=i < C, other=float("inf"))

    mean = tl.zeros([OWN], tl.float32)
    for first in range(0, C, OTHERS):
        j = _tokens(first, OTHERS, WIDE)
        keys = _load(key, j, key_t, key_f, C, D, PIECES, COVERS_C, COVERS_D)
        values = _load(x, j, x_t, x_f, C, D, PIECES, COVERS_C, COVERS_D)
        scores = _scores(query, keys, PIECES, PRECISION) * scale
        weights = tl.exp2(scores - level[:, None])
        products = weights * _scores(grads, values, PIECES, PRECISION)
        if not COVERS_C:
            # Where there is no key the score is 0, and its weight may be infinite.
            products = tl.where(j[None, :] < C, products, 0.0)
        mean += tl.sum(products, 1)
    tl.store(delta + rows + i, mean, mask=i < C)

    total = _zeros(OWN, PIECES)
    for first in range(0, C, OTHERS):
        j = _tokens(first, OTHERS, WIDE)
        keys = _load(key, j, key_t, key_f, C, D, PIECES, COVERS_C, COVERS_D)
        values = _load(x, j, x_t, x_f, C, D, PIECES, COVERS_C, COVERS_D)
        scores = _scores(query, keys, PIECES, PRECISION) * scale
        weights = tl.exp2(scores - level[:, None])
        grad_weights = _scores(grads, values, PIECES, PRECISION)
        grad_scores = weights * (grad_weights - mean[:, None]) * plain_scale
        if not COVERS_C:
            grad_scores = tl.where(j[None, :] < C, grad_scores, 0.0)
        total = _add_product(total, grad_scores, keys, PIECES, PRECISION)

    if GAMMA:
        factor = tl.load(gamma).to(tl.float32)
    if RESIDUAL:
        grads = _load(grad, i, grad_t, grad_f, C, D, PIECES, COVERS_C, COVERS_D)
    for n in tl.static_range(_count(PIECES)):
        features = _start(PIECES, n) + tl.arange(0, _width(PIECES, n))
        place = out + i[:, None] * out_t + features[None, :] * out_f
        inside = (i[:, None] < C) & (features[None, :] < D)
        result = total[n]
        if GAMMA:
            result *= factor
        if ADD:
            result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            result += grads[n].to(tl.float32)
        tl.store(place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_keys(
    x, key, grad, lse, gamma, out, delta, grad_key,
    S, C, D, scale, plain_scale, slices_each,
    x_b, x_s, x_t, x_f,
    key_b, key_t, key_f,
    grad_b, grad_s, grad_t, grad_f,
    out_b, out_s, out_t, out_f,
    lse_b,
    CHANNELS: tl.constexpr, FEATURES: tl.constexpr, LAYOUT: tl.constexpr,
    UNIT: tl.constexpr, PADDED: tl.constexpr, COVERS_PADDED: tl.constexpr,
    GAMMA: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    OWN: tl.constexpr, OTHERS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of `OWN` tokens as values, in some slices of one image, and keys.

    Adds the gradient of the values, times gamma with GAMMA, to `out`. The gradient of the keys,
    without gamma, is the sum over the program's slices; `grad_key` (B, parts, C, D), contiguous,
    takes one for each part of the slices, to be added in their order.
    """
    PIECES: tl.constexpr = pieces(PADDED, EXACT)
    COVERS_C: tl.constexpr = _covers_c(UNIT, OWN, OTHERS)
    COVERS_D: tl.constexpr = _covers_d(PIECES, PADDED, COVERS_PADDED)
    blocks = tl.cdiv(C, OWN)
    parts = tl.cdiv(S, slices_each)
    part = tl.program_id(0) // blocks
    image = (part // parts).to(tl.int64)
    first_slice = (part % parts) * slices_each
    x += image * x_b
    grad += image * grad_b
    out += image * out_b

    j = _tokens((tl.program_id(0) % blocks) * OWN, OWN, WIDE)
    keys = _load(key + image * key_b, j, key_t, key_f, C, D, PIECES, COVERS_C, COVERS_D)
    to_keys = _zeros(OWN, PIECES)
    if GAMMA:
        factor = tl.load(gamma).to(tl.float32)
    # With addresses kept from slice to slice there would not be enough registers.
    for n in tl.range(0, tl.minimum(slices_each, S - first_slice), disable_licm=True):
        s = first_slice.to(tl.int64) + n
        rows = image * lse_b + s * C
        values = _load(x + s * x_s, j, x_t, x_f, C, D, PIECES, COVERS_C, COVERS_D)
        to_values = _zeros(OWN, PIECES)
        for first in range(0, C, OTHERS):
            i = _tokens(first, OTHERS, WIDE)
            queries = _load(x + s * x_s, i, x_t, x_f, C, D, PIECES, COVERS_C, COVERS_D)
            grads = _load(grad + s * grad_s, i, grad_t, grad_f, C, D, PIECES, COVERS_C, COVERS_D)
            # Where there is no query the level is infinite and every weight 0.
            level = tl.load(lse + rows + i, mask=i < C, other=float("inf"))
            mean = tl.load(delta + rows + i, mask=i < C, other=0.0)
            scores = _scores(keys, queries, PIECES, PRECISION) * scale
            weights = tl.exp2(scores - level[None, :])
            to_values = _add_product(to_values, weights, grads, PIECES, PRECISION)
            grad_weights = _scores(values, grads, PIECES, PRECISION)
            grad_scores = weights * (grad_weights - mean[None, :]) * plain_scale
            to_keys = _add_product(to_keys, grad_scores, queries, PIECES, PRECISION)

        for n in tl.static_range(_count(PIECES)):
            features = _start(PIECES, n) + tl.arange(0, _width(PIECES, n))
            place = out + s * out_s + j[:, None] * out_t + features[None, :] * out_f
            inside = (j[:, None] < C) & (features[None, :] < D)
            result = to_values[n]
            if GAMMA:
                result *= factor
            result += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, result.to(out.dtype.element_ty), mask=inside)

    place = grad_key + (part.to(tl.int64) * C + j)[:, None] * D
    for n in tl.static_range(_count(PIECES)):
        features = _start(PIECES, n) + tl.arange(0, _width(PIECES, n))
        inside = (j[:, None] < C) & (features[None, :] < D)
        tl.store(place + features[None, :], to_keys[n], mask=inside)


@triton.jit
def copy(
    source, target,
    A, D, R,
    source_b, source_r, source_a, source_d,
    target_b, target_r, target_a, target_d,
    WIDE: tl.constexpr, TILE_A: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One program: a tile (A, D) of slices, from one order in memory into another.

    A is the slices or the tokens, R the other of the two. Reading and writing each go along their
    own memory; the tile is turned on the way, in shared memory.
    """
    tiles_d = tl.cdiv(D, TILE_D)
    tiles_a = tl.cdiv(A, TILE_A)
    number = tl.program_id(0)
    d = _tokens((number % tiles_d) * TILE_D, TILE_D, WIDE)[None, :]
    a = _tokens((number // tiles_d % tiles_a) * TILE_A, TILE_A, WIDE)[:, None]
    outer = number // tiles_d // tiles_a
    r = (outer % R).to(tl.int64)
    b = (outer // R).to(tl.int64)
    source += b * source_b + r * source_r
    target += b * target_b + r * target_r
    inside = (a < A) & (d < D)
    tile = tl.load(source + a * source_a + d * source_d, mask=inside)
    tl.store(target + a * target_a + d * target_d, tile, mask=inside)
