/* The two branches of the fully attentional layer on a CPU, forward and backward, in float32.
 *
 * A branch is S slices of C tokens with D features (columns: S = W, D = H; rows: S = H, D = W).
 * Of a slice's C x C map only the rows of LANES queries exist at a time, in a core's cache, and
 * they are kept with the query in the vector lane, weights[j][lane]: softmax then runs down the
 * lanes without a shuffle, and every product of both directions has one form,
 *
 *     c[r][lane] += sum over k of a(r, k) * b[k][lane],
 *
 * with a read one number at a time and b and c in whole vectors. One register tile of ROWS rows by
 * LANES lanes does them all.
 *
 * A slice is gathered from the feature map by its strides as [d][c], tokens side by side, and its
 * result scattered back; the feature map is never copied whole. Backward builds the map again from
 * x and the key. The key's gradient is summed over slices in an order that depends on the number of
 * threads alone, so the same call gives the same bits.
 */

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

/* Threads are those of the OpenMP library that PyTorch has loaded. It is called by the functions
 * that GNU's, LLVM's and Intel's have in common, so that any compiler builds for any of them. */
void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
void GOMP_barrier(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* The register tile: ROWS x 2 sums, 2 vectors of b and one number of a must fit the registers. */
#if defined(__AVX512F__)
#define VECTOR 16
#define ROWS 12
#elif defined(__AVX__)
#define VECTOR 8
#define ROWS 6
#elif defined(__aarch64__)
#define VECTOR 4
#define ROWS 12
#else
#define VECTOR 4
#define ROWS 6
#endif
#define LANES (2 * VECTOR) /* queries whose rows of the map exist at a time */
#define DEPTH 128          /* keys at a time in a sum over them: their weights stay in L1 */
#define QUERIES 64         /* queries at a time in a sum over them, backward */
#define GROUP 16           /* slices gathered at a time where neighbours share cache lines */

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}
#if defined(__AVX512F__)
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
INLINE vec larger(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
#endif

/* exp(x) for x <= 0, to 2 units in the last place; not-a-number stays. Below -87 it is 1e-38.
 * Cephes' polynomial for |r| <= ln(2)/2. */
INLINE vec exp_nonpositive(vec x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = choose(x < all(-87.0f), all(-87.0f), x);
    vec shifted = x * all(1.44269504088896341f) + all(magic);
    vec n = shifted - all(magic);
    vec r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
    vec p = all(1.9875691500e-4f);
    p = p * r + all(1.3981999507e-3f);
    p = p * r + all(8.3334519073e-3f);
    p = p * r + all(4.1665795894e-2f);
    p = p * r + all(1.6666665459e-1f);
    p = p * r + all(5.0000001201e-1f);
    p = p * (r * r) + r + all(1.0f);
    return (vec)((ivec)p + ((ivec)shifted << 23));
}

/* ---------------------------------------------------------------- the register tile */

typedef struct {
    const float *a, *b;
    float *c;
    ptrdiff_t a_stride, b_stride, c_stride, depth;
} Product;

/* down: a(r, k) = a[k * a_stride + r]; otherwise a(r, k) = a[r * a_stride + k]. */
INLINE void tile(const Product *p, const int rows, const int down, const int add, float *maximum) {
    vec sum[ROWS][2];
    const float *a = p->a, *b = p->b;
    const ptrdiff_t a_stride = p->a_stride, b_stride = p->b_stride, c_stride = p->c_stride;
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            sum[r][v] = add ? load(p->c + r * c_stride + v * VECTOR) : all(0.0f);
    /* Every third row has a pointer; the two after it are reached by an address's index. */
    const float *third[4] = {a, a + 3 * a_stride, a + 6 * a_stride, a + 9 * a_stride};
    for (ptrdiff_t k = p->depth; k > 0; k--) {
        vec b0 = load(b), b1 = load(b + VECTOR);
        b += b_stride;
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            vec number = all(down ? a[r] : third[r / 3][r % 3 * a_stride]);
            sum[r][0] += number * b0;
            sum[r][1] += number * b1;
        }
        a += a_stride;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) third[i]++;
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) store(p->c + r * c_stride + v * VECTOR, sum[r][v]);
    if (maximum)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            vec top = load(maximum + v * VECTOR);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) top = larger(sum[r][v], top);
            store(maximum + v * VECTOR, top);
        }
}

/* The number of rows is known only at run time but must be a constant in the tile. */
#if ROWS > 6
#define MORE(n, ...) case n: tile(__VA_ARGS__); break;
#else
#define MORE(n, ...)
#endif
#define ONE(n, ...) case n: tile(__VA_ARGS__); break;
#define TILES(p, rows, ...)                                                               \
    switch (rows) {                                                                       \
        ONE(1, p, 1, __VA_ARGS__) ONE(2, p, 2, __VA_ARGS__) ONE(3, p, 3, __VA_ARGS__)     \
        ONE(4, p, 4, __VA_ARGS__) ONE(5, p, 5, __VA_ARGS__) ONE(6, p, 6, __VA_ARGS__)     \
        MORE(7, p, 7, __VA_ARGS__) MORE(8, p, 8, __VA_ARGS__) MORE(9, p, 9, __VA_ARGS__)  \
        MORE(10, p, 10, __VA_ARGS__) MORE(11, p, 11, __VA_ARGS__)                         \
        MORE(12, p, 12, __VA_ARGS__)                                                      \
    }

INLINE ptrdiff_t pieces(ptrdiff_t n, ptrdiff_t most) { return (n + most - 1) / most; }
INLINE ptrdiff_t start_of(ptrdiff_t piece, ptrdiff_t n, ptrdiff_t count) {
    return n * piece / count;
}
INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* c[r][lane] = sum over k of a[k][r] * b[k][lane] for all r; each lane's maximum over r on request. */
static void product_down(Product p, ptrdiff_t rows, float *maximum) {
    ptrdiff_t count = pieces(rows, ROWS);
    Product part = p;
    for (ptrdiff_t i = 0; i < count; i++) {
        ptrdiff_t r = start_of(i, rows, count), n = start_of(i + 1, rows, count) - r;
        part.a = p.a + r;
        part.c = p.c + r * p.c_stride;
        if (maximum) TILES(&part, n, 1, 0, maximum)
        else TILES(&part, n, 1, 0, NULL)
    }
}

/* c[r][lane] = or += sum over k of a[r][k] * b[k][lane] for all r. */
static void product_across(Product p, ptrdiff_t rows, int add) {
    ptrdiff_t count = pieces(rows, ROWS);
    Product part = p;
    for (ptrdiff_t i = 0; i < count; i++) {
        ptrdiff_t r = start_of(i, rows, count), n = start_of(i + 1, rows, count) - r;
        part.a = p.a + r * p.a_stride;
        part.c = p.c + r * p.c_stride;
        if (add) TILES(&part, n, 0, 1, NULL)
        else TILES(&part, n, 0, 0, NULL)
    }
}

/* ---------------------------------------------------------------- moving slices */

/* The first n elements at p and zeros. */
INLINE vec load_part(const float *p, ptrdiff_t n) {
    float part[VECTOR] = {0};
    float *to = part;
    if (n >= VECTOR) return load(p);
    if (n & 8) memcpy(to, p, 32), to += 8, p += 8;
    if (n & 4) memcpy(to, p, 16), to += 4, p += 4;
    if (n & 2) memcpy(to, p, 8), to += 2, p += 2;
    if (n & 1) *to = *p;
    return load(part);
}

INLINE void store_part(float *p, vec v, ptrdiff_t n) {
    float part[VECTOR];
    const float *from = part;
    if (n >= VECTOR) {
        store(p, v);
        return;
    }
    store(part, v);
    if (n & 8) memcpy(p, from, 32), from += 8, p += 8;
    if (n & 4) memcpy(p, from, 16), from += 4, p += 4;
    if (n & 2) memcpy(p, from, 8), from += 2, p += 2;
    if (n & 1) *p = *from;
}

/* Clang accepts the second name alone, older GCC the first. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE void interleave(vec a, vec b, vec *low, vec *high) {
#if VECTOR == 16
    *low = SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *high = SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif VECTOR == 8
    *low = SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    *high = SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    *low = SHUFFLE(a, b, 0, 4, 1, 5);
    *high = SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

/* to[j][i] = or += from[i][j] for i < rows, j < columns, both at most VECTOR. */
INLINE void transpose(const float *from, ptrdiff_t from_row, ptrdiff_t rows, ptrdiff_t columns,
                      float *to, ptrdiff_t to_row, const int add) {
    vec one[VECTOR], two[VECTOR];
#pragma GCC unroll 16
    for (int i = 0; i < VECTOR; i++)
        one[i] = i < rows ? load_part(from + i * from_row, columns) : all(0.0f);
#pragma GCC unroll 4
    for (int stage = VECTOR; stage > 1; stage /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < VECTOR / 2; i++)
            interleave(one[i], one[i + VECTOR / 2], &two[2 * i], &two[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < VECTOR; i++) one[i] = two[i];
    }
#pragma GCC unroll 16
    for (int j = 0; j < VECTOR; j++)
        if (j < columns) {
            float *at = to + j * to_row;
            if (add) one[j] += load_part(at, rows);
            store_part(at, one[j], rows);
        }
}

/* How the slices of one branch lie in a feature map, and how one is kept: as [d][c], rows of `row`
 * elements, zeros after the last token. */
typedef struct {
    ptrdiff_t tokens, features, slices;                 /* C, D, S */
    ptrdiff_t token_step, feature_step, slice_step;     /* strides of the map within an image */
    ptrdiff_t row, slot;                                /* elements of a row, and of a slice */
} Branch;

static Branch branch_of(ptrdiff_t tokens, ptrdiff_t features, ptrdiff_t slices,
                        ptrdiff_t token_step, ptrdiff_t feature_step, ptrdiff_t slice_step) {
    /* An odd number of cache lines, so that the rows do not fall on a few sets of the cache. */
    ptrdiff_t row = pieces(tokens, LANES) * LANES;
    row = pieces(row, 16) * 16 + (pieces(row, 16) % 2 ? 0 : 16);
    return (Branch){tokens,       features,   slices, token_step,
                    feature_step, slice_step, row,    row * features + 16};
}

/* Copy between slices first .. first + count of a map and slots, one slice in each. */
INLINE void move(const Branch *g, float *map, ptrdiff_t first, ptrdiff_t count, float *slots,
                 const int out, const int add) {
    const ptrdiff_t C = g->tokens, D = g->features;
    map += first * g->slice_step;
    if (g->token_step == 1) {
        for (ptrdiff_t s = 0; s < count; s++)
            for (ptrdiff_t d = 0; d < D; d++) {
                float *at = map + s * g->slice_step + d * g->feature_step;
                float *slot = slots + s * g->slot + d * g->row;
                if (!out) memcpy(slot, at, sizeof(float) * (size_t)C);
                else if (add) for (ptrdiff_t c = 0; c < C; c++) at[c] += slot[c];
                else memcpy(at, slot, sizeof(float) * (size_t)C);
            }
        return;
    }
    /* Tiles of tokens by the axis that lies side by side in the map: features, or slices. */
    const int by_feature = g->feature_step == 1 || g->slice_step != 1;
    const ptrdiff_t side = by_feature ? D : count, other = by_feature ? count : D;
    const ptrdiff_t map_side = by_feature ? g->feature_step : g->slice_step;
    const ptrdiff_t map_other = by_feature ? g->slice_step : g->feature_step;
    const ptrdiff_t slot_side = by_feature ? g->row : g->slot;
    const ptrdiff_t slot_other = by_feature ? g->slot : g->row;
    for (ptrdiff_t c = 0; c < C; c += VECTOR)
        for (ptrdiff_t o = 0; o < other; o++)
            for (ptrdiff_t i = 0; i < side; i += VECTOR) {
                ptrdiff_t m = least(VECTOR, C - c), n = least(VECTOR, side - i);
                float *at = map + c * g->token_step + o * map_other + i * map_side;
                float *slot = slots + c + o * slot_other + i * slot_side;
                if (map_side != 1) {
                    for (ptrdiff_t y = 0; y < m; y++)
                        for (ptrdiff_t x = 0; x < n; x++) {
                            float *one = at + y * g->token_step + x * map_side;
                            float *two = slot + y + x * slot_side;
                            if (out) *one = add ? *one + *two : *two;
                            else *two = *one;
                        }
                } else if (out) transpose(slot, slot_side, n, m, at, g->token_step, add);
                else transpose(at, g->token_step, m, n, slot, slot_side, 0);
            }
}

static void gather(const Branch *g, const float *map, ptrdiff_t first, ptrdiff_t count,
                   float *slots) {
    move(g, (float *)map, first, count, slots, 0, 0);
}

static void scatter(const Branch *g, float *map, ptrdiff_t first, ptrdiff_t count, float *slots,
                    int add) {
    if (add) move(g, map, first, count, slots, 1, 1);
    else move(g, map, first, count, slots, 1, 0);
}

/* ---------------------------------------------------------------- one slice */

/* x, key and out are [d][c] in rows of g->row; weights is [j][LANES]. */
static void forward_slice(const Branch *g, const float *x, const float *key, float *out,
                          float *weights) {
    const ptrdiff_t C = g->tokens, D = g->features, row = g->row;
    for (ptrdiff_t i = 0; i < C; i += LANES) {
        float maximum[LANES];
        for (int v = 0; v < LANES; v++) maximum[v] = -__builtin_inff();
        product_down((Product){key, x + i, weights, row, row, LANES, D}, C, maximum);
        vec top[2], sum[2];
        for (int v = 0; v < 2; v++) top[v] = load(maximum + v * VECTOR), sum[v] = all(0.0f);
        for (ptrdiff_t j = 0; j < C; j += DEPTH) {
            ptrdiff_t end = least(j + DEPTH, C);
            for (ptrdiff_t k = j; k < end; k++)
                for (int v = 0; v < 2; v++) {
                    float *at = weights + k * LANES + v * VECTOR;
                    vec weight = exp_nonpositive(load(at) - top[v]);
                    sum[v] += weight;
                    store(at, weight);
                }
            product_across(
                (Product){x + j, weights + j * LANES, out + i, row, LANES, row, end - j}, D, j > 0);
        }
        for (int v = 0; v < 2; v++) {
            vec inverse = all(1.0f) / sum[v];
            for (ptrdiff_t d = 0; d < D; d++) {
                float *at = out + d * row + i + v * VECTOR;
                store(at, load(at) * inverse);
            }
        }
    }
}

/* Workspace for one block of the map and of its gradient, both ways round. */
typedef struct {
    float *weights, *grads;             /* [j][LANES] */
    float *weight_rows, *grad_rows;     /* [QUERIES][row] */
} Maps;

static ptrdiff_t elements_in_maps(const Branch *g) { return 2 * g->row * (LANES + QUERIES); }

static Maps maps_in(const Branch *g, float *workspace) {
    /* Zeros after the last token stay: they are read as lanes and as padding. */
    memset(workspace, 0, sizeof(float) * (size_t)elements_in_maps(g));
    return (Maps){workspace, workspace + g->row * LANES, workspace + 2 * g->row * LANES,
                  workspace + 2 * g->row * LANES + g->row * QUERIES};
}

/* rows[lane][j] = block[j][lane] */
static void turn(const Branch *g, const float *block, float *rows) {
    for (ptrdiff_t j = 0; j < g->tokens; j += VECTOR)
        for (int v = 0; v < LANES; v += VECTOR)
            transpose(block + j * LANES + v, LANES, VECTOR, VECTOR, rows + v * g->row + j, g->row,
                      0);
}

/* weights: scores to softmax. grads: from those of the weights to those of the scores. */
static void softmax_backward(ptrdiff_t C, const float *maximum, float *weights, float *grads) {
    vec top[2], sum[2], dot[2];
    for (int v = 0; v < 2; v++)
        top[v] = load(maximum + v * VECTOR), sum[v] = dot[v] = all(0.0f);
    for (ptrdiff_t j = 0; j < C; j++)
        for (int v = 0; v < 2; v++) {
            ptrdiff_t at = j * LANES + v * VECTOR;
            vec weight = exp_nonpositive(load(weights + at) - top[v]);
            sum[v] += weight;
            dot[v] += weight * load(grads + at);
            store(weights + at, weight);
        }
    for (int v = 0; v < 2; v++) sum[v] = all(1.0f) / sum[v], dot[v] *= sum[v];
    for (ptrdiff_t j = 0; j < C; j++)
        for (int v = 0; v < 2; v++) {
            ptrdiff_t at = j * LANES + v * VECTOR;
            vec weight = load(weights + at) * sum[v];
            store(weights + at, weight);
            store(grads + at, weight * (load(grads + at) - dot[v]));
        }
}

/* Writes grad_x; adds to grad_key, which is not yet multiplied by the scale of the scores. */
static void backward_slice(const Branch *g, const float *x, const float *key, const float *grad,
                           float *grad_x, float *grad_key, const Maps *maps) {
    const ptrdiff_t C = g->tokens, D = g->features, row = g->row;
    memset(grad_x, 0, sizeof(float) * (size_t)g->slot);
    for (ptrdiff_t block = 0; block < C; block += QUERIES) {
        ptrdiff_t end = least(block + QUERIES, C);
        for (ptrdiff_t i = block; i < end; i += LANES) {
            float maximum[LANES];
            for (int v = 0; v < LANES; v++) maximum[v] = -__builtin_inff();
            product_down((Product){key, x + i, maps->weights, row, row, LANES, D}, C, maximum);
            product_down((Product){x, grad + i, maps->grads, row, row, LANES, D}, C, NULL);
            softmax_backward(C, maximum, maps->weights, maps->grads);
            for (ptrdiff_t j = 0; j < C; j += DEPTH)
                product_across((Product){key + j, maps->grads + j * LANES, grad_x + i, row, LANES,
                                         row, least(DEPTH, C - j)},
                               D, 1);
            turn(g, maps->weights, maps->weight_rows + (i - block) * row);
            turn(g, maps->grads, maps->grad_rows + (i - block) * row);
        }
        for (ptrdiff_t j = 0; j < C; j += LANES) {
            product_across((Product){grad + block, maps->weight_rows + j, grad_x + j, row, row, row,
                                     end - block},
                           D, 1);
            product_across((Product){x + block, maps->grad_rows + j, grad_key + j, row, row, row,
                                     end - block},
                           D, 1);
        }
    }
}

/* ---------------------------------------------------------------- one branch of all images */

static float *floats(ptrdiff_t count) {
    void *p = NULL;
    return posix_memalign(&p, 64, sizeof(float) * (size_t)(count + 16)) ? NULL : p;
}

/* The slices of a thread, counted through all images, and how many are gathered together. */
typedef struct {
    ptrdiff_t begin, end, group;
} Share;

static Share share_of(const Branch *g, ptrdiff_t images, ptrdiff_t thread, ptrdiff_t threads) {
    ptrdiff_t begin = start_of(thread, images * g->slices, threads);
    ptrdiff_t end = start_of(thread + 1, images * g->slices, threads);
    ptrdiff_t most = g->slice_step == 1 ? least(GROUP, g->slices) : 1;
    ptrdiff_t groups = pieces(end - begin, most);
    return (Share){begin, end, groups ? pieces(end - begin, groups) : 0};
}

static ptrdiff_t group_at(const Branch *g, const Share *share, ptrdiff_t slice) {
    return least(share->group, least(share->end - slice, g->slices - slice % g->slices));
}

/* A feature map or a gradient: how its slices lie, where it begins, from one image to the next. */
typedef struct {
    Branch branch;
    float *data;
    ptrdiff_t image_step;
} Map;

static float *image_of(const Map *map, ptrdiff_t slice) {
    return map->data + slice / map->branch.slices * map->image_step;
}

/* Called by every thread of a team for its own share of the slices. 1 where memory ran out. With a
 * gamma, gamma times the attended values is written, and the first branch adds x to it. */
static int forward_branch(ptrdiff_t images, const Map *x, const float *keys, const Map *out,
                          const float *gamma, int add) {
    const Branch *g = &x->branch;
    Share share = share_of(g, images, omp_get_thread_num(), omp_get_num_threads());
    ptrdiff_t slots = share.group * g->slot;
    float *xs = floats(2 * slots + g->row * LANES), *outs = xs + slots, *weights = outs + slots;
    if (!xs) return 1;
    memset(xs, 0, sizeof(float) * (size_t)slots);
    for (ptrdiff_t slice = share.begin, count; slice < share.end; slice += count) {
        count = group_at(g, &share, slice);
        const float *key = keys + slice / g->slices * g->slot;
        gather(g, image_of(x, slice), slice % g->slices, count, xs);
        for (ptrdiff_t s = 0; s < count; s++)
            forward_slice(g, xs + s * g->slot, key, outs + s * g->slot, weights);
        for (ptrdiff_t i = 0; gamma && i < count * g->slot; i++)
            outs[i] = add ? *gamma * outs[i] : *gamma * outs[i] + xs[i];
        scatter(&out->branch, image_of(out, slice), slice % g->slices, count, outs, add);
    }
    free(xs);
    return 0;
}

/* Thread t's share of the gradient of image b's key is in slot b + t: threads take slices in
 * order, so no two pairs that occur have the same sum. */
static int backward_branch(ptrdiff_t images, const Map *x, const float *keys, const Map *grad,
                           const Map *grad_x, float *key_shares, int add) {
    const Branch *g = &x->branch;
    ptrdiff_t me = omp_get_thread_num();
    Share share = share_of(g, images, me, omp_get_num_threads());
    ptrdiff_t slots = share.group * g->slot;
    float *xs = floats(3 * slots + elements_in_maps(g)), *grads = xs + slots;
    if (!xs) return 1;
    float *outs = grads + slots;
    Maps maps = maps_in(g, outs + slots);
    memset(xs, 0, sizeof(float) * (size_t)(2 * slots));
    for (ptrdiff_t slice = share.begin, count; slice < share.end; slice += count) {
        count = group_at(g, &share, slice);
        ptrdiff_t image = slice / g->slices, first = slice % g->slices;
        float *key_share = key_shares + (image + me) * g->slot;
        if (slice == share.begin || first == 0)
            memset(key_share, 0, sizeof(float) * (size_t)g->slot);
        gather(g, image_of(x, slice), first, count, xs);
        gather(&grad->branch, image_of(grad, slice), first, count, grads);
        for (ptrdiff_t s = 0; s < count; s++)
            backward_slice(g, xs + s * g->slot, keys + image * g->slot, grads + s * g->slot,
                           outs + s * g->slot, key_share, &maps);
        scatter(&grad_x->branch, image_of(grad_x, slice), first, count, outs, add);
    }
    free(xs);
    return 0;
}

/* Add up the threads' shares of the keys' gradients, in the order of the threads. */
static void reduce_keys(const Branch *g, ptrdiff_t images, const float *shares, float scale,
                        float *grad_keys) {
    ptrdiff_t me = omp_get_thread_num(), threads = omp_get_num_threads();
    ptrdiff_t end = start_of(me + 1, images * g->tokens, threads);
    for (ptrdiff_t i = start_of(me, images * g->tokens, threads); i < end; i++) {
        ptrdiff_t b = i / g->tokens, c = i % g->tokens;
        float *to = grad_keys + i * g->features;
        for (ptrdiff_t d = 0; d < g->features; d++) to[d] = 0.0f;
        for (ptrdiff_t t = 0; t < threads; t++) {
            Share share = share_of(g, images, t, threads);
            ptrdiff_t begin = share.begin > b * g->slices ? share.begin : b * g->slices;
            if (begin >= least(share.end, (b + 1) * g->slices)) continue;
            const float *from = shares + (b + t) * g->slot + c;
            for (ptrdiff_t d = 0; d < g->features; d++) to[d] += scale * from[d * g->row];
        }
    }
}

/* ---------------------------------------------------------------- what Python calls */

/* Both branches of a map of sizes B, C, H, W with the strides of those axes, in elements. */
typedef struct {
    Map columns, rows;
} Both;

static Both both_of(const int64_t *sizes, const float *data, const int64_t *strides) {
    return (Both){
        {branch_of(sizes[1], sizes[2], sizes[3], strides[1], strides[2], strides[3]),
         (float *)data, strides[0]},
        {branch_of(sizes[1], sizes[3], sizes[2], strides[1], strides[3], strides[2]),
         (float *)data, strides[0]},
    };
}

/* A call, as the threads of its team see it. */
typedef struct {
    ptrdiff_t images;
    Both x, out;                           /* forward: the result, backward: the gradient of x */
    const float *column_keys, *row_keys;   /* contiguous, (B, H, C) and (B, W, C) */
    float scale;
    float *column_slots, *row_slots;       /* the keys times scale, each as [d][c] in a slot */
    const float *gamma;                    /* forward: with one, gamma * (columns + rows) + x */
    Both grad;                             /* backward, to the end: of the result */
    float *grad_column_keys, *grad_row_keys; /* (B, C, H) and (B, C, W) */
    float *column_shares, *row_shares;     /* threads' shares of them, in slots */
    int failed;
} Call;

static void prepare_keys(const Branch *g, ptrdiff_t images, const float *keys, float scale,
                         float *slots) {
    ptrdiff_t me = omp_get_thread_num(), threads = omp_get_num_threads();
    ptrdiff_t end = start_of(me + 1, images, threads);
    for (ptrdiff_t b = start_of(me, images, threads); b < end; b++) {
        const float *key = keys + b * g->tokens * g->features;
        float *to = slots + b * g->slot;
        memset(to, 0, sizeof(float) * (size_t)g->slot);
        for (ptrdiff_t d = 0; d < g->features; d++)
            for (ptrdiff_t c = 0; c < g->tokens; c++)
                to[d * g->row + c] = scale * key[d * g->tokens + c];
    }
}

static void prepare(const Call *call) {
    prepare_keys(&call->x.columns.branch, call->images, call->column_keys, call->scale,
                 call->column_slots);
    prepare_keys(&call->x.rows.branch, call->images, call->row_keys, call->scale, call->row_slots);
    GOMP_barrier();
}

static void note(Call *call, int failed) { __atomic_or_fetch(&call->failed, failed, __ATOMIC_RELAXED); }

/* Rows add to what columns wrote, so a barrier stands between the two. */
static void forward(void *data) {
    Call *call = data;
    prepare(call);
    note(call, forward_branch(call->images, &call->x.columns, call->column_slots,
                              &call->out.columns, call->gamma, 0));
    GOMP_barrier();
    note(call, forward_branch(call->images, &call->x.rows, call->row_slots, &call->out.rows,
                              call->gamma, 1));
}

static void backward(void *data) {
    Call *call = data;
    prepare(call);
    note(call, backward_branch(call->images, &call->x.columns, call->column_slots,
                               &call->grad.columns, &call->out.columns, call->column_shares, 0));
    GOMP_barrier();
    note(call, backward_branch(call->images, &call->x.rows, call->row_slots, &call->grad.rows,
                               &call->out.rows, call->row_shares, 1));
    GOMP_barrier();
    reduce_keys(&call->x.columns.branch, call->images, call->column_shares, call->scale,
                call->grad_column_keys);
    reduce_keys(&call->x.rows.branch, call->images, call->row_shares, call->scale,
                call->grad_row_keys);
}

/* Both functions return 0, or 1 where memory ran out. */
int fullattn_forward(const int64_t *sizes, const float *x, const int64_t *x_strides,
                     const float *column_keys, const float *row_keys, float scale,
                     const float *gamma, float *out, const int64_t *out_strides, int threads) {
    Call call = {.images = sizes[0],
                 .x = both_of(sizes, x, x_strides),
                 .out = both_of(sizes, out, out_strides),
                 .column_keys = column_keys,
                 .row_keys = row_keys,
                 .scale = scale,
                 .gamma = gamma};
    ptrdiff_t columns = call.x.columns.branch.slot, rows = call.x.rows.branch.slot;
    call.column_slots = floats(call.images * (columns + rows));
    if (!call.column_slots) return 1;
    call.row_slots = call.column_slots + call.images * columns;
    GOMP_parallel(forward, &call, (unsigned)threads, 0);
    free(call.column_slots);
    return call.failed;
}

int fullattn_backward(const int64_t *sizes, const float *x, const int64_t *x_strides,
                      const float *column_keys, const float *row_keys, float scale,
                      const float *grad, const int64_t *grad_strides, float *grad_x,
                      const int64_t *grad_x_strides, float *grad_column_keys,
                      float *grad_row_keys, int threads) {
    Call call = {.images = sizes[0],
                 .x = both_of(sizes, x, x_strides),
                 .out = both_of(sizes, grad_x, grad_x_strides),
                 .column_keys = column_keys,
                 .row_keys = row_keys,
                 .scale = scale,
                 .grad = both_of(sizes, grad, grad_strides),
                 .grad_column_keys = grad_column_keys,
                 .grad_row_keys = grad_row_keys};
    ptrdiff_t columns = call.x.columns.branch.slot, rows = call.x.rows.branch.slot;
    ptrdiff_t shares = call.images + threads;
    call.column_slots = floats((call.images + shares) * (columns + rows));
    if (!call.column_slots) return 1;
    call.row_slots = call.column_slots + call.images * columns;
    call.column_shares = call.row_slots + call.images * rows;
    call.row_shares = call.column_shares + shares * columns;
    GOMP_parallel(backward, &call, (unsigned)threads, 0);
    free(call.column_slots);
    return call.failed;
}
