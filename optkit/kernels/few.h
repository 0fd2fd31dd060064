/* Few rows of x by packed weights, in registers: the loops that steps of one token are made of. */
#ifndef OPTKIT_FEW_H
#define OPTKIT_FEW_H
#include "nibbles.h"

/* `rows` rows of x by `count` blocks of weights; both are constants after inlining. */
INLINE void few_int8(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    const int64_t cols = c->layer->cols, bytes = apart(c, block, count);
    const uint8_t *weight = c->layer->weight + block * c->block_bytes;
    const float *x = c->x + m * cols;
    vec sum[FEW_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = v_zero();
    int64_t k = 0;
    for (; k + 4 <= cols; k += 4) {
        const int64_t ahead = ahead_of(c, k * LANES, count);
        UNROLL for (int b = 0; b < count; b++) _mm_prefetch((const char *)weight + b * bytes + k * LANES + ahead, _MM_HINT_T0);
        UNROLL for (int i = 0; i < 4; i++) {
            vec w[4];
            UNROLL for (int b = 0; b < count; b++) w[b] = v_from_int8(weight + b * bytes + (k + i) * LANES);
            UNROLL for (int r = 0; r < rows; r++) {
                vec value = v_set(x[r * cols + k + i]);
                UNROLL for (int b = 0; b < count; b++) sum[r][b] = v_fma(w[b], value, sum[r][b]);
            }
        }
    }
    for (; k < cols; k++)
        UNROLL for (int r = 0; r < rows; r++) {
            vec value = v_set(x[r * cols + k]);
            UNROLL for (int b = 0; b < count; b++) sum[r][b] = v_fma(v_from_int8(weight + b * bytes + k * LANES), value, sum[r][b]);
        }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) finish(c, m + r, block + b, sum[r][b]);
}

INLINE void few(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    if (c->layer->group)
        few_int4(c, m, block, rows, count);
    else
        few_int8(c, m, block, rows, count);
}

/* All rows of x by `count` blocks: the blocks stay in the cache while x passes by. `most` rows at once leave no register over. */
#define FEW(count, most)                                                                      \
    static void few_##count(const struct call *c, int64_t block)                              \
    {                                                                                         \
        int64_t m = 0;                                                                        \
        for (; m + most <= c->m; m += most) few(c, m, block, most, count);                    \
        for (; most > 4 && m + 4 <= c->m; m += 4) few(c, m, block, most > 4 ? 4 : 1, count);  \
        for (; most > 2 && m + 2 <= c->m; m += 2) few(c, m, block, most > 2 ? 2 : 1, count);  \
        for (; most > 1 && m < c->m; m++) few(c, m, block, 1, count);                         \
    }
#if defined(__AVX512F__)
FEW(4, 4)
FEW(2, 8)
#else
FEW(4, 1)
FEW(2, 2)
#endif

/* Blocks [block, end); block is even, and so is end or it is the last. */
static void few_blocks(const struct call *c, int64_t block, int64_t end)
{
    const int64_t four_below = c->layer->group ? 2 * FEW_ROWS : FEW_ROWS;
    for (; c->m < four_below && block + 4 <= end; block += 4) few_4(c, block);
    for (; block < end; block += 2) few_2(c, block);
}

#endif
