/* A packed weight, a product with it in progress, and how its results are stored. The layouts are told in linear.c. */
#ifndef OPTKIT_CALL_H
#define OPTKIT_CALL_H
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
    int64_t float16;          /* int4: scales and points are float16, else bfloat16 */
    int64_t integer;          /* x is rounded to int8 */
};

/* x for int4 weights: 16-bit numbers (m, cols), the steps (m, blocks of columns) that they are multiples of, and the sums of x (m, groups). */
struct fixed {
    int16_t *numbers;
    float *steps, *sums;
};

struct call {
    const struct layer *layer;
    const float *x;        /* (m, cols): for int8 weights */
    struct fixed fixed;    /* for int4 weights */
    const void *rounded;   /* x in tiles or panels of bfloat16, or of int8 */
    const float *x_scale;  /* (m): of integer x */
    const void *bias;
    void *y;
    int64_t m, blocks, block_bytes, apart, groups, group_bytes; /* apart: bytes between the blocks of one pass */
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

#endif
