/* Products with weights of which only some are stored: a bit for every weight, and the values of those whose bit is set, row by row.
 *
 * Few rows of x are bound by memory: the bits put the values into their lanes, and what is zero is neither read nor stored. Many rows are the
 * business of others: for them the weights are written out densely.
 * The values are followed by 16 more numbers that may be read and never count. Columns beyond the last have no bit. All functions return 0, or
 * a negative number for a refusal.
 */
#include "lanes.h"

enum { MOST_ROWS = 8, NOT_HERE = -3 };

/* Shared with ctypes: keep the order of the fields. */
struct sparse {
    const uint16_t *bits;  /* (rows, blocks of 16 columns) */
    const void *values;    /* float32 or bfloat16 */
    const int64_t *starts; /* (rows): where a row's values begin */
    int64_t rows, cols, half;
};

#if defined(__AVX512F__)

/* 16 weights from the values at `from`, of which `*count` were taken. */
INLINE vec spread(const struct sparse *s, uint16_t bits, int64_t from, int *count)
{
    *count = __builtin_popcount(bits);
    const vec packed = s->half ? v_from_bfloat16(_mm256_loadu_si256((const __m256i *)((const uint16_t *)s->values + from)))
                               : v_load((const float *)s->values + from);
    return _mm512_maskz_expand_ps((__mmask16)bits, packed);
}

/* One row of weights by `m` rows of x; m is a constant after inlining. */
INLINE void row_by(const struct sparse *s, int64_t row, const float *x, const float *bias, float *y, const int m)
{
    const int64_t blocks = (s->cols + LANES - 1) / LANES;
    const uint16_t *bits = s->bits + row * blocks;
    int64_t at = s->starts[row], block = 0;
    vec sum[MOST_ROWS], other[MOST_ROWS];
    int count;
    UNROLL for (int r = 0; r < m; r++) sum[r] = other[r] = v_set(0);
    for (; block + 1 < s->cols / LANES; block += 2) {
        const vec one = spread(s, bits[block], at, &count);
        at += count;
        const vec two = spread(s, bits[block + 1], at, &count);
        at += count;
        UNROLL for (int r = 0; r < m; r++) {
            sum[r] = v_fma(one, v_load(x + r * s->cols + block * LANES), sum[r]);
            other[r] = v_fma(two, v_load(x + r * s->cols + (block + 1) * LANES), other[r]);
        }
    }
    for (; block < blocks; block++) {
        const vec one = spread(s, bits[block], at, &count);
        at += count;
        UNROLL for (int r = 0; r < m; r++)
            sum[r] = v_fma(one, v_load_first(x + r * s->cols + block * LANES, s->cols - block * LANES), sum[r]);
    }
    UNROLL for (int r = 0; r < m; r++) y[r * s->rows + row] = v_sum(v_add(sum[r], other[r])) + (bias ? bias[row] : 0);
}

static void row_by_any(const struct sparse *s, int64_t row, const float *x, const float *bias, float *y, int64_t m)
{
    for (; m >= 4; m -= 4, x += 4 * s->cols, y += 4 * s->rows) row_by(s, row, x, bias, y, 4);
    if (m >= 2) {
        row_by(s, row, x, bias, y, 2);
        m -= 2, x += 2 * s->cols, y += 2 * s->rows;
    }
    if (m) row_by(s, row, x, bias, y, 1);
}

/* y (m, rows) = x (m, cols) w^T + bias (rows), all float32. */
int optkit_sparse_few(const struct sparse *s, const float *x, const float *bias, float *y, int64_t m, int32_t threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < s->rows; row++) row_by_any(s, row, x, bias, y, m);
    return 0;
}

/* The weights (rows, cols) as they would be without bits, in the type of the values. */
int optkit_sparse_dense(const struct sparse *s, void *out, int32_t threads)
{
    const int64_t blocks = (s->cols + LANES - 1) / LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < s->rows; row++) {
        int64_t at = s->starts[row];
        for (int64_t block = 0; block < blocks; block++) {
            int count;
            const vec w = spread(s, s->bits[row * blocks + block], at, &count);
            at += count;
            store(out, row * s->cols + block * LANES, (int)s->half, s->cols - block * LANES, w);
        }
    }
    return 0;
}

#else

int optkit_sparse_few(const struct sparse *s, const float *x, const float *bias, float *y, int64_t m, int32_t threads)
{
    (void)s, (void)x, (void)bias, (void)y, (void)m, (void)threads;
    return NOT_HERE;
}

int optkit_sparse_dense(const struct sparse *s, void *out, int32_t threads)
{
    (void)s, (void)out, (void)threads;
    return NOT_HERE;
}

#endif
