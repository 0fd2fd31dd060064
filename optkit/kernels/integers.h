/* Weights that ask for integer x: every row of x is rounded to int8, with one scale, and the products are summed exactly in int32. */
#ifndef OPTKIT_INTEGERS_H
#define OPTKIT_INTEGERS_H
#include "panels.h"

INLINE int64_t quads_of(const struct layer *layer) { return (layer->cols + 63) / 64 * 16; }

static __attribute__((noinline)) void finish_integers(const struct call *c, int64_t m, int64_t block, ivec sum)
{
    if (block >= c->blocks)
        return;
    const uint8_t *totals = c->layer->weight + (block + 1) * c->block_bytes - 64; /* 128 times the sum of each row of weights */
    finish(c, m, block, i_float(QUAD_OFFSET ? i_sub(sum, i_load(totals)) : sum));
}

INLINE void integer_rows(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    const int64_t bytes = apart(c, block, count), steps = quads_of(c->layer);
    const uint8_t *weight = c->layer->weight + block * c->block_bytes;
    const quad *x = (const quad *)c->rounded + m * steps;
    ivec sum[PANEL][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = i_zero();
    for (int64_t k = 0; k < steps; k++) {
        quads w[4];
        const int64_t ahead = ahead_of(c, k * 64, count);
        UNROLL for (int b = 0; b < count; b++) {
            w[b] = i_quads(weight + b * bytes + k * 64);
            if (rows <= 4) _mm_prefetch((const char *)weight + b * bytes + k * 64 + ahead, _MM_HINT_T0);
        }
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = i_dot(sum[r][b], x[k * rows + r], w[b]);
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) finish_integers(c, m + r, block + b, sum[r][b]);
}

/* Panels [from, to) of x by blocks [block, end). */
static void integer_blocks(const struct call *c, int64_t block, int64_t end, int64_t from, int64_t to)
{
    for (; c->m <= 4 && block + FEW_WIDE <= end; block += FEW_WIDE)
        for (int64_t p = from; p < to; p++) {
            const int64_t m = panel_start(c->m, p);
#define BODY(n) integer_rows(c, m, block, n, FEW_WIDE)
            WITH_FEW_ROWS(panel_start(c->m, p + 1) - m, BODY)
#undef BODY
        }
    for (; block < end; block += WIDE)
        for (int64_t p = from; p < to; p++) {
            const int64_t m = panel_start(c->m, p);
#define BODY(n) integer_rows(c, m, block, n, WIDE)
            WITH_ROWS(panel_start(c->m, p + 1) - m, BODY)
#undef BODY
        }
}

/* The scale of a row of x, and the row in int8 with zeros up to a multiple of 64. What is not finite makes the scale NaN, and so the results. */
INLINE float round_row(const struct layer *layer, const void *x, int half, int64_t at, int8_t *to)
{
    const int64_t cols = layer->cols;
    vec most = v_zero(), wrong = v_zero();
    for (int64_t k = 0; k < cols; k += LANES) {
        vec value = load(x, at + k, half, cols - k);
        most = v_max(most, v_abs(value));
        wrong = v_fma(value, v_zero(), wrong);
    }
    const float scale = layer->input_scale ? *layer->input_scale : v_largest(most) / 127.0f;
    const vec high = v_set(127.0f), low = v_set(-127.0f);
    for (int64_t k = 0; k < (cols + 63) / 64 * 64; k += LANES) {
        vec value = scale > 0 && k < cols ? v_div(load(x, at + k, half, cols - k), v_set(scale)) : v_zero();
        v_to_int8(to + k, v_max(v_min(value, high), low));
    }
    return scale + v_sum(wrong);
}

/* Rows [m, m + rows) of x as one panel; bytes: room for a row. */
static void integer_panel(const struct call *c, const void *x, int64_t m, int64_t rows, quad *to, float *scales, int8_t *bytes)
{
    const int64_t steps = quads_of(c->layer);
    for (int64_t r = 0; r < rows; r++) {
        scales[m + r] = round_row(c->layer, x, c->half, (m + r) * c->layer->cols, bytes);
        for (int64_t k = 0; k < steps; k++) to[m * steps + k * rows + r] = quad_of(bytes + 4 * k);
    }
}

#endif
