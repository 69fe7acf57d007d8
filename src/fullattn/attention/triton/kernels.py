"""The kernels: attention over the slices of a feature map, forward and backward, in Triton.

A slice is a column or a row of a feature map in channels_last: C tokens (the channels) of D
features (H or W); the tokens of one feature are contiguous in memory. Query and value are the
slice itself; the key (C, D) is shared by all slices of an image.

Feature maps and keys are passed as tensor descriptors over (B, S, D, C). Their boxes are `BOX`
features of `BLOCK_M` tokens (`*_own`: the tokens whose results a program computes) or of `BLOCK_N`
tokens (those of one step of the inner loop); a second descriptor, `*_rest`, has a narrower box for
the remaining features. A tile is a tuple of boxes: 96 features are read as 64 and 32, not as 128.
Elements outside of D and C are read as 0 and not written. FEATURES: D, rounded up to a multiple of
16.

Scores, softmax and all sums are float32; products take the tensor cores in the dtype of the input.
The softmax is taken in base 2: `scale` is |scale| · log2(e), and NEGATIVE says that the scale is
negative. A row of the map is kept as its maximum `m` (of the scores before `scale`) and `log_l`,
the base-2 logarithm of its sum after that maximum was subtracted, each (B, S, C). Their sum would
be the row's log-sum-exp, but rounded by |score| · 6e-8, which is several percent of a weight where
scores reach 1e6. No kernel uses atomics.
"""

# Triton reads annotations and names in a kernel itself, and its functions have no types.
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.knobs import runtime

__all__ = [
    "backward_keys",
    "backward_queries",
    "copy",
    "finish",
    "forward",
    "means",
    "spread",
    "widths",
]

# Decorators of functions that the kernels call. The interpreter runs them undecorated: decorated,
# each call would patch Triton's whole language, which takes ten times as long as everything else.
_function = (lambda fn: fn) if runtime.interpret else triton.jit
_constexpr_function = (lambda fn: fn) if runtime.interpret else triton.constexpr_function


@_constexpr_function
def widths(features: int, box: int) -> tuple[int, ...]:
    """Split features into boxes: as many of width `box` as fit, and one for the rest."""
    count, rest = divmod(features, box)
    if rest:
        rest = max(16, 1 << (rest - 1).bit_length())
    if rest == box:
        count, rest = count + 1, 0
    return (box,) * count + ((rest,) if rest else ())


@_constexpr_function
def _count(widths):
    return len(widths)


@_constexpr_function
def _width(widths, n):
    return widths[n]


@_constexpr_function
def _start(widths, n):
    return sum(widths[:n])


@_function
def _load_box(
    boxes, rest, image, s, token, n: tl.constexpr, WIDTHS: tl.constexpr, TOKENS: tl.constexpr
):
    """Load a box of some tokens, (width, TOKENS)."""
    feature = _start(WIDTHS, n)
    if _width(WIDTHS, n) == _width(WIDTHS, 0):
        box = boxes.load([image, s, feature, token])
    else:
        box = rest.load([image, s, feature, token])
    return tl.reshape(box, (_width(WIDTHS, n), TOKENS))


@_function
def _store_box(
    boxes, rest, box, image, s, token,
    n: tl.constexpr, WIDTHS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Store a box of some tokens, (width, TOKENS)."""
    feature = _start(WIDTHS, n)
    box = tl.reshape(box.to(boxes.dtype), (1, 1, _width(WIDTHS, n), TOKENS))
    if _width(WIDTHS, n) == _width(WIDTHS, 0):
        boxes.store([image, s, feature, token], box)
    else:
        rest.store([image, s, feature, token], box)


@_function
def _load(boxes, rest, image, s, token, WIDTHS: tl.constexpr, TOKENS: tl.constexpr):
    """Load the transposed tile of some tokens, (D, TOKENS): a tuple of its boxes."""
    tile = ()
    for n in tl.static_range(_count(WIDTHS)):
        tile = tile + (_load_box(boxes, rest, image, s, token, n, WIDTHS, TOKENS),)
    return tile


@_function
def _zeros(TOKENS: tl.constexpr, WIDTHS: tl.constexpr):
    tile = ()
    for n in tl.static_range(_count(WIDTHS)):
        tile = tile + (tl.zeros([TOKENS, _width(WIDTHS, n)], tl.float32),)
    return tile


@_function
def _scores(left, right, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply the tokens of two transposed tiles, leftᵀ (N, D) · right (D, M), in float32."""
    scores = tl.dot(tl.trans(left[0]), right[0], input_precision=PRECISION)
    for n in tl.static_range(1, _count(WIDTHS)):
        scores = tl.dot(tl.trans(left[n]), right[n], scores, input_precision=PRECISION)
    return scores


@_function
def _add_product(total, weights, right, WIDTHS: tl.constexpr, PRECISION: tl.constexpr):
    """Return total (N, D) + weights (N, M) · rightᵀ (M, D)."""
    weights = weights.to(right[0].dtype)
    result = ()
    for n in tl.static_range(_count(WIDTHS)):
        result = result + (
            tl.dot(weights, tl.trans(right[n]), total[n], input_precision=PRECISION),
        )
    return result


@_function
def _scaled(tile, factor, WIDTHS: tl.constexpr):
    result = ()
    for n in tl.static_range(_count(WIDTHS)):
        result = result + (tile[n] * factor,)
    return result


@triton.jit
def forward(
    x_own, x_own_rest, x, x_rest, key, key_rest, kept_own, kept_own_rest, out_own, out_own_rest,
    gamma, m, log_l,
    S, C, scale,
    ADD: tl.constexpr, RESIDUAL: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    DIVIDES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr, BOX: tl.constexpr,
):  # fmt: skip
    """Compute softmax(x · keyᵀ) · x for `BLOCK_M` tokens of one slice, as queries.

    With ADD, `kept`, which may be `out`, is added; with RESIDUAL, gamma times that plus x is
    written.
    """
    WIDTHS: tl.constexpr = widths(FEATURES, BOX)
    blocks = tl.cdiv(C, BLOCK_M)
    # The blocks of a slice have consecutive programs, because they read the same values.
    number = tl.program_id(0) // blocks
    image, s = number // S, number % S
    first = (tl.program_id(0) % blocks) * BLOCK_M

    query = _load(x_own, x_own_rest, image, s, first, WIDTHS, BLOCK_M)
    acc = _zeros(BLOCK_M, WIDTHS)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, C, BLOCK_N):
        keys = _load(key, key_rest, image, 0, j, WIDTHS, BLOCK_N)
        values = _load(x, x_rest, image, s, j, WIDTHS, BLOCK_N)
        scores = _scores(query, keys, WIDTHS, PRECISION)
        if NEGATIVE:
            scores = -scores
        if not DIVIDES:
            scores = tl.where(j + tl.arange(0, BLOCK_N)[None, :] < C, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        alpha = tl.exp2((m_i - m_new) * scale)
        p = tl.exp2((scores - m_new[:, None]) * scale)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = _scaled(acc, alpha[:, None], WIDTHS)
        acc = _add_product(acc, p, values, WIDTHS, PRECISION)
        m_i = m_new

    if RESIDUAL:
        factor = tl.load(gamma).to(tl.float32)
    for n in tl.static_range(_count(WIDTHS)):
        result = tl.trans(acc[n] / l_i[:, None])
        if ADD:
            earlier = _load_box(kept_own, kept_own_rest, image, s, first, n, WIDTHS, BLOCK_M)
            result += earlier.to(tl.float32)
        if RESIDUAL:
            # Read again, because holding it through the loop would take registers.
            residual = _load_box(x_own, x_own_rest, image, s, first, n, WIDTHS, BLOCK_M)
            result = result * factor + residual.to(tl.float32)
        _store_box(out_own, out_own_rest, result, image, s, first, n, WIDTHS, BLOCK_M)
    i = first + tl.arange(0, BLOCK_M)
    row = number.to(tl.int64) * C + i
    tl.store(m + row, m_i, mask=i < C)
    tl.store(log_l + row, tl.log2(l_i), mask=i < C)


@triton.jit
def backward_queries(
    x_own, x_own_rest, grad_own, grad_own_rest, kept_own, kept_own_rest,
    x, x_rest, key, key_rest, out_own, out_own_rest, gamma, m, log_l, delta, delta_sums,
    S, C, scale, signed_scale,
    KEPT: tl.constexpr, ADD: tl.constexpr, GAMMA: tl.constexpr, RESIDUAL: tl.constexpr,
    NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    DIVIDES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr, BOX: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of `BLOCK_M` tokens of one slice as queries.

    It is written to `out`: times gamma with GAMMA, added to `out` with ADD, and with RESIDUAL plus
    `grad`, the gradient of the residual. δᵢ = gradᵢ · resultᵢ is written to `delta`: with KEPT from
    the branch's result in `kept`, otherwise from the map, as Σⱼ Aᵢⱼ (gradᵢ · xⱼ). Sums of 16 δ are
    written to `delta_sums` (B, S, C / 16).
    """
    WIDTHS: tl.constexpr = widths(FEATURES, BOX)
    blocks = tl.cdiv(C, BLOCK_M)
    number = tl.program_id(0) // blocks
    image, s = number // S, number % S
    first = (tl.program_id(0) % blocks) * BLOCK_M
    i = first + tl.arange(0, BLOCK_M)
    row = number.to(tl.int64) * C + i

    query = _load(x_own, x_own_rest, image, s, first, WIDTHS, BLOCK_M)
    grads = _load(grad_own, grad_own_rest, image, s, first, WIDTHS, BLOCK_M)
    m_i = tl.load(m + row, mask=i < C, other=0.0)
    log_l_i = tl.load(log_l + row, mask=i < C, other=0.0)

    delta_i = tl.zeros([BLOCK_M], tl.float32)
    if KEPT:
        for n in tl.static_range(_count(WIDTHS)):
            kept = _load_box(kept_own, kept_own_rest, image, s, first, n, WIDTHS, BLOCK_M)
            delta_i += tl.sum(kept.to(tl.float32) * grads[n].to(tl.float32), 0)
    else:
        for j in range(0, C, BLOCK_N):
            keys = _load(key, key_rest, image, 0, j, WIDTHS, BLOCK_N)
            values = _load(x, x_rest, image, s, j, WIDTHS, BLOCK_N)
            scores = _scores(query, keys, WIDTHS, PRECISION)
            if NEGATIVE:
                scores = -scores
            p = tl.exp2((scores - m_i[:, None]) * scale - log_l_i[:, None])
            p *= _scores(grads, values, WIDTHS, PRECISION)
            if not DIVIDES:
                # Past the last key the score is 0, and its weight may be infinite.
                p = tl.where(j + tl.arange(0, BLOCK_N)[None, :] < C, p, 0.0)
            delta_i += tl.sum(p, 1)
    tl.store(delta + row, delta_i, mask=i < C)
    sixteens = first // 16 + tl.arange(0, BLOCK_M // 16)
    sums = tl.sum(tl.reshape(delta_i, (BLOCK_M // 16, 16)), 1)
    place = delta_sums + number.to(tl.int64) * tl.cdiv(C, 16) + sixteens
    tl.store(place, sums, mask=sixteens < tl.cdiv(C, 16))

    acc = _zeros(BLOCK_M, WIDTHS)
    for j in range(0, C, BLOCK_N):
        keys = _load(key, key_rest, image, 0, j, WIDTHS, BLOCK_N)
        values = _load(x, x_rest, image, s, j, WIDTHS, BLOCK_N)
        scores = _scores(query, keys, WIDTHS, PRECISION)
        if NEGATIVE:
            scores = -scores
        p = tl.exp2((scores - m_i[:, None]) * scale - log_l_i[:, None])
        ds = p * (_scores(grads, values, WIDTHS, PRECISION) - delta_i[:, None])
        if not DIVIDES:
            ds = tl.where(j + tl.arange(0, BLOCK_N)[None, :] < C, ds, 0.0)
        acc = _add_product(acc, ds, keys, WIDTHS, PRECISION)

    factor = signed_scale
    if GAMMA:
        factor *= tl.load(gamma).to(tl.float32)
    for n in tl.static_range(_count(WIDTHS)):
        result = tl.trans(acc[n]) * factor
        if ADD:
            earlier = _load_box(out_own, out_own_rest, image, s, first, n, WIDTHS, BLOCK_M)
            result += earlier.to(tl.float32)
        if RESIDUAL:
            residual = _load_box(grad_own, grad_own_rest, image, s, first, n, WIDTHS, BLOCK_M)
            result += residual.to(tl.float32)
        _store_box(out_own, out_own_rest, result, image, s, first, n, WIDTHS, BLOCK_M)


@triton.jit
def backward_keys(
    x_own, x_own_rest, key_own, key_own_rest, x, x_rest, grad, grad_rest,
    out_own, out_own_rest, sums_own, sums_own_rest, gamma, m, log_l, delta,
    S, C, parts, scale,
    GAMMA: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    DIVIDES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FEATURES: tl.constexpr, BOX: tl.constexpr,
):  # fmt: skip
    """Compute gradients of `BLOCK_M` tokens as values, in some slices of one image, and as keys.

    The gradient of the values, times gamma with GAMMA, is added to `out`. The gradient of the keys,
    without gamma and the scale, is summed over the program's slices and written to `sums` (B,
    parts, D, C), whose parts `finish` adds in their order.
    """
    WIDTHS: tl.constexpr = widths(FEATURES, BOX)
    blocks = tl.cdiv(C, BLOCK_M)
    part = tl.program_id(0) // blocks
    image, part = part // parts, part % parts
    first = (tl.program_id(0) % blocks) * BLOCK_M

    keys = _load(key_own, key_own_rest, image, 0, first, WIDTHS, BLOCK_M)
    to_keys = _zeros(BLOCK_M, WIDTHS)
    factor = 1.0
    if GAMMA:
        factor = tl.load(gamma).to(tl.float32)
    # Without hoisting, because addresses held across slices would take too many registers.
    for s in tl.range(part, S, parts, disable_licm=True):
        values = _load(x_own, x_own_rest, image, s, first, WIDTHS, BLOCK_M)
        to_values = _zeros(BLOCK_M, WIDTHS)
        rows = (image.to(tl.int64) * S + s) * C
        for start in range(0, C, BLOCK_N):
            queries = _load(x, x_rest, image, s, start, WIDTHS, BLOCK_N)
            grads = _load(grad, grad_rest, image, s, start, WIDTHS, BLOCK_N)
            i = start + tl.arange(0, BLOCK_N)
            # Past the last query `log_l` is infinite, so that every weight is 0.
            if DIVIDES:
                m_i = tl.load(m + rows + i)
                log_l_i = tl.load(log_l + rows + i)
                delta_i = tl.load(delta + rows + i)
            else:
                m_i = tl.load(m + rows + i, mask=i < C, other=0.0)
                log_l_i = tl.load(log_l + rows + i, mask=i < C, other=float("inf"))
                delta_i = tl.load(delta + rows + i, mask=i < C, other=0.0)
            scores = _scores(keys, queries, WIDTHS, PRECISION)
            if NEGATIVE:
                scores = -scores
            p = tl.exp2((scores - m_i[None, :]) * scale - log_l_i[None, :])
            to_values = _add_product(to_values, p, grads, WIDTHS, PRECISION)
            dp = _scores(values, grads, WIDTHS, PRECISION)
            ds = p * (dp - delta_i[None, :])
            to_keys = _add_product(to_keys, ds, queries, WIDTHS, PRECISION)

        for n in tl.static_range(_count(WIDTHS)):
            earlier = _load_box(out_own, out_own_rest, image, s, first, n, WIDTHS, BLOCK_M)
            result = tl.trans(to_values[n]) * factor
            result += earlier.to(tl.float32)
            _store_box(out_own, out_own_rest, result, image, s, first, n, WIDTHS, BLOCK_M)

    for n in tl.static_range(_count(WIDTHS)):
        result = tl.trans(to_keys[n])
        _store_box(sums_own, sums_own_rest, result, image, part, first, n, WIDTHS, BLOCK_M)


@_function
def _add_parts(
    sums, out, gamma, block, B, C, PADDED_C, D, parts, factor,
    GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write factor · Σ of sums (B, parts, D, PADDED_C), times gamma with GAMMA, to a block."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < B * D * C
    image = (place // C // D).to(tl.int64)
    sums += image * parts * D * PADDED_C + (place // C % D) * PADDED_C + place % C
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(parts):
        total += tl.load(sums, mask=inside, other=0.0)
        sums += D * PADDED_C
    if GAMMA:
        factor *= tl.load(gamma).to(tl.float32)
    tl.store(out + place, (total * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    column_sums, row_sums, delta_sums, gamma, grad_column_key, grad_row_key, grad_gamma,
    B, C, PADDED_C, H, W, column_parts, row_parts, deltas, signed_scale,
    GAMMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of `backward_keys` and `backward_queries`.

    Writes the gradients of both keys, (B, D, C) and contiguous, and in the last program that of
    gamma.
    """
    pid = tl.program_id(0)
    columns = tl.cdiv(B * H * C, BLOCK)
    rows = tl.cdiv(B * W * C, BLOCK)
    if pid < columns:
        _add_parts(
            column_sums, grad_column_key, gamma, pid,
            B, C, PADDED_C, H, column_parts, signed_scale, GAMMA, BLOCK,
        )  # fmt: skip
    elif pid < columns + rows:
        _add_parts(
            row_sums, grad_row_key, gamma, pid - columns,
            B, C, PADDED_C, W, row_parts, signed_scale, GAMMA, BLOCK,
        )  # fmt: skip
    else:
        if GAMMA:
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, deltas, BLOCK):
                place = start + tl.arange(0, BLOCK)
                total += tl.load(delta_sums + place, mask=place < deltas, other=0.0)
            tl.store(grad_gamma, tl.sum(total, 0).to(grad_gamma.dtype.element_ty))


@triton.jit
def copy(
    source, target,
    A, D, R,
    source_b, source_r, source_a, source_d,
    target_b, target_r, target_a, target_d,
    WIDE: tl.constexpr, TILE_A: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Copy a tile (A, D) of a feature map from one order in memory into another.

    D is the channels, A the positions along which one of the two maps is contiguous, and R the
    other positions. Both reads and writes are coalesced; the tile is transposed in between.
    """
    tiles_d = tl.cdiv(D, TILE_D)
    tiles_a = tl.cdiv(A, TILE_A)
    number = tl.program_id(0)
    d = (number % tiles_d) * TILE_D + tl.arange(0, TILE_D)[None, :]
    a = (number // tiles_d % tiles_a) * TILE_A + tl.arange(0, TILE_A)[:, None]
    if WIDE:
        d, a = d.to(tl.int64), a.to(tl.int64)
    outer = number // tiles_d // tiles_a
    r = (outer % R).to(tl.int64)
    b = (outer // R).to(tl.int64)
    source += b * source_b + r * source_r
    target += b * target_b + r * target_r
    inside = (a < A) & (d < D)
    tile = tl.load(source + a * source_a + d * source_d, mask=inside)
    tile = tile.to(target.dtype.element_ty)
    tl.store(target + a * target_a + d * target_d, tile, mask=inside)


@triton.jit
def means(
    x, column_mean, row_mean,
    B, C, H, W, x_b, x_h, x_w,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Average a map over W for each row, or over H for each column.

    The map is in channels_last; the means are (B, H, C) and (B, W, C), contiguous.
    """
    blocks = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    pid = tl.program_id(0) // blocks
    steps = tl.arange(0, BLOCK)[:, None]
    total = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    if pid < B * H:
        image, h = (pid // H).to(tl.int64), pid % H
        start = x + image * x_b + h.to(tl.int64) * x_h + c
        for first in range(0, W, BLOCK):
            w = first + steps
            inside = (w < W) & (c < C)
            total += tl.load(start + w * x_w, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0)[None, :] / W
        tl.store(column_mean + pid.to(tl.int64) * C + c, mean, mask=c < C)
    else:
        pid -= B * H
        image, w = (pid // W).to(tl.int64), pid % W
        start = x + image * x_b + w.to(tl.int64) * x_w + c
        for first in range(0, H, BLOCK):
            h = (first + steps).to(tl.int64)
            inside = (h < H) & (c < C)
            total += tl.load(start + h * x_h, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(total, 0)[None, :] / H
        tl.store(row_mean + pid.to(tl.int64) * C + c, mean, mask=c < C)


@triton.jit
def spread(
    grad, grad_column, grad_row, out,
    C, H, W, b, p,
    TILE_P: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """Add the gradient of `means` to that of the map itself, for a tile (positions, channels).

    Both maps are in channels_last: images lie `b` apart, and positions h · W + w lie `p` apart.
    """
    tiles_c = tl.cdiv(C, TILE_C)
    tiles_p = tl.cdiv(H * W, TILE_P)
    pid = tl.program_id(0)
    c = (pid % tiles_c) * TILE_C + tl.arange(0, TILE_C)[None, :]
    position = (pid // tiles_c % tiles_p) * TILE_P + tl.arange(0, TILE_P)[:, None]
    image = (pid // tiles_c // tiles_p).to(tl.int64)
    inside = (position < H * W) & (c < C)
    h, w = position // W, position % W
    of_column = tl.load(grad_column + (image * H + h) * C + c, mask=inside, other=0.0)
    of_row = tl.load(grad_row + (image * W + w) * C + c, mask=inside, other=0.0)
    place = image * b + position.to(tl.int64) * p + c
    result = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    result += of_column.to(tl.float32) / W + of_row.to(tl.float32) / H
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
