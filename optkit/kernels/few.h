/* Few rows of x by packed weights, in registers: the loops that steps of one token are made of. The layouts are told in linear.c. */
#ifndef OPTKIT_FEW_H
#define OPTKIT_FEW_H
#include <math.h>
#include <stdlib.h>

#include "lanes.h"

enum { AHEAD = 2048, FEW_ROWS = 8, WORK_PER_THREAD = 1 << 16, ROUND_TOGETHER = 1 << 18 };
enum { NO_MEMORY = -1, OUT_OF_RANGE = -2 };

/* Shared with ctypes: keep the order of the fields. */
struct layer {
    const uint8_t *weight;
    const float *scale;       /* int8: one a row. int4: unused */
    const float *input_scale; /* integer x: its scale, or NULL for one a row of x, found anew */
    int64_t rows, cols;       /* of the weight: out_features, in_features */
    int64_t group;            /* int4: columns in a group; else 0 */
    int64_t many_from;        /* from so many rows of x on, they are rounded and multiplied in tiles or panels */
    int64_t float16;          /* int4: scales and points are float16, else bfloat16 */
    int64_t integer;          /* x is rounded to int8 */
};

struct call {
    const struct layer *layer;
    const float *x;        /* (m, cols) */
    const float *sums;     /* (m, groups): sums of x, int4 only */
    const void *rounded;   /* x in tiles or panels of bfloat16, or of int8 */
    const float *x_scale;  /* (m): of integer x */
    const void *bias;
    void *y;
    int64_t m, blocks, block_bytes, groups, group_bytes;
    int32_t bias_half, half; /* 1: bfloat16, 0: float32 */
};

/* The bytes from one block to the next of `count`; 0 where only the first exists, which is then computed again and not stored. */
INLINE int64_t apart(const struct call *c, int64_t block, const int count) { return block + count > c->blocks ? 0 : c->block_bytes; }

/* How far ahead of byte `at` of `count` blocks to fetch: beyond their end, the next such blocks go on. */
INLINE int64_t ahead_of(const struct call *c, int64_t at, const int count) { return at + AHEAD < c->block_bytes ? AHEAD : AHEAD + (count - 1) * c->block_bytes; }

/* Scale (int8), add the bias and store 16 results of row m; nothing for a block beyond the last. */
static __attribute__((noinline)) void finish(const struct call *c, int64_t m, int64_t block, vec sum)
{
    const int64_t row = block * LANES, here = c->layer->rows - row;
    if (here <= 0)
        return;
    if (c->layer->scale) {
        vec scale = v_load_first(c->layer->scale + row, here);
        sum = v_mul(sum, c->layer->integer ? v_mul(scale, v_set(c->x_scale[m])) : scale);
    }
    if (c->bias)
        sum = v_add(sum, load(c->bias, row, c->bias_half, here));
    store(c->y, m * c->layer->rows + row, c->half, here, sum);
}

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

/* 16 scales or points of int4 groups. */
INLINE vec group_number(const struct call *c, const uint8_t *at)
{
    __m256i bits = _mm256_loadu_si256((const __m256i *)at);
    return c->layer->float16 ? v_from_float16(bits) : v_from_bfloat16(bits);
}

INLINE void few_int4(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    const int64_t cols = c->layer->cols, group = c->layer->group, bytes = apart(c, block, count);
    const uint8_t *weight = c->layer->weight + block * c->block_bytes;
    vec total[FEW_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) total[r][b] = v_zero();
    for (int64_t g = 0; g < c->groups; g++, weight += c->group_bytes) {
        const float *x = c->x + m * cols + g * group;
        const int64_t ahead = ahead_of(c, g * c->group_bytes, count);
        vec sum[FEW_ROWS][4];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = v_zero();
        for (int64_t k = 0; k < group; k += 8) {
            ivec w[4];
            UNROLL for (int b = 0; b < count; b++) {
                w[b] = i_held(i_load(weight + b * bytes + k * 8));
                _mm_prefetch((const char *)weight + b * bytes + k * 8 + ahead, _MM_HINT_T0);
            }
            UNROLL for (int i = 0; i < 8; i++) {
                vec q[4];
                UNROLL for (int b = 0; b < count; b++) q[b] = v_nibble(w[b], 4 * (i / 2) + 16 * (i % 2));
                UNROLL for (int r = 0; r < rows; r++) {
                    vec value = v_set(x[r * cols + k + i]);
                    UNROLL for (int b = 0; b < count; b++) sum[r][b] = v_fma(q[b], value, sum[r][b]);
                }
            }
        }
        UNROLL for (int b = 0; b < count; b++) {
            const uint8_t *at = weight + b * bytes + group * 8;
            vec scale = v_mul(group_number(c, at), v_set(16.0f)); /* the sum is of x times 1 + q / 16 */
            vec point = v_fma(group_number(c, at + 2 * LANES), v_set(0.0625f), v_set(1.0f));
            UNROLL for (int r = 0; r < rows; r++)
                total[r][b] = v_fma(v_fnma(point, v_set(c->sums[(m + r) * c->groups + g]), sum[r][b]), scale, total[r][b]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) finish(c, m + r, block + b, total[r][b]);
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
    for (; c->m < FEW_ROWS && block + 4 <= end; block += 4) few_4(c, block);
    for (; block < end; block += 2) few_2(c, block);
}

/* What follows from the sizes of a layer. */
INLINE struct call call_of(const struct layer *layer, int64_t m)
{
    struct call c = {.layer = layer, .m = m};
    c.blocks = (layer->rows + LANES - 1) / LANES;
    c.groups = layer->group ? layer->cols / layer->group : 0;
    c.group_bytes = layer->group * 8 + 64;
    if (layer->integer)
        c.block_bytes = ((layer->cols + 63) / 64 * 16 + 1) * 64;
    else
        c.block_bytes = layer->group ? c.groups * c.group_bytes : (layer->cols + 3) / 4 * 4 * LANES;
    return c;
}

INLINE void sum_groups(const float *x, int64_t groups, int64_t group, float *to)
{
    for (int64_t g = 0; g < groups; g++, x += group) {
        vec sum = v_zero();
        for (int64_t k = 0; k < group; k += LANES) sum = v_add(sum, v_load(x + k));
        to[g] = v_sum(sum);
    }
}

#endif
