/* Few rows of x by int4 weights, in integers.
 *
 * x is rounded to 16-bit fixed point, with one step for a block of columns: its error is at most 1/65534 of the largest number in the block. Pairs of
 * nibbles become pairs of 16-bit numbers in two operations, and the sums of a block are exact.
 */
#ifndef OPTKIT_NIBBLES_H
#define OPTKIT_NIBBLES_H
#include "call.h"

enum { WIDEST_BLOCK = 128 }; /* so that 15 times the sum of a block fits into 32 bits, and one outlier coarsens few others */

/* The columns of x that share a step: a group of weights, or an equal part of it. */
INLINE int64_t fixed_block(const struct layer *layer) { return layer->group <= WIDEST_BLOCK ? layer->group : layer->group % 64 ? 32 : 64; }

/* The bytes that m rows of x take in fixed point, and such rows in so many bytes. */
INLINE size_t fixed_bytes(const struct layer *layer, int64_t m)
{
    return (size_t)(m * layer->cols) * sizeof(int16_t) + (size_t)(m * (layer->cols / fixed_block(layer) + layer->cols / layer->group)) * sizeof(float);
}

INLINE struct fixed fixed_in(const struct layer *layer, int64_t m, void *room)
{
    float *steps = room, *sums = steps + m * (layer->cols / fixed_block(layer));
    return (struct fixed){(int16_t *)(sums + m * (layer->cols / layer->group)), steps, sums};
}

/* What follows a group's nibbles: 16 scales, or 16 points. */
INLINE vec group_number(const struct call *c, const uint8_t *at)
{
    __m256i bits = _mm256_loadu_si256((const __m256i *)at);
    return c->layer->float16 ? v_from_float16(bits) : v_from_bfloat16(bits);
}

/* Columns [at, at + block) of x as 16-bit numbers; returns their step, or NaN where one is not finite. total: the sum of the numbers. */
INLINE float fixed_of(const void *x, int half, int64_t at, int64_t block, int16_t *to, float *total)
{
    vec most = v_zero(), wrong = v_zero();
    for (int64_t k = 0; k < block; k += LANES) {
        vec value = load(x, at + k, half, LANES);
        most = v_max(most, v_abs(value));
        wrong = v_fma(value, v_zero(), wrong);
    }
    const float largest = v_largest(most);
    const vec inverse = v_set(largest > 1e-30f ? 32767.0f / largest : 0.0f);
    ivec sum = i_zero();
    for (int64_t k = 0; k < block; k += LANES) {
        ivec number = i_of(v_mul(load(x, at + k, half, LANES), inverse));
        i_to_int16(to + k, number);
        sum = i_add(sum, number);
    }
    *total = v_sum(i_float(sum));
    return largest / 32767.0f + v_sum(wrong);
}

/* Row `at` of x (cols) in fixed point, the steps of its blocks, and the sums of its groups. */
static void fixed_row(const struct layer *layer, const void *x, int half, int64_t row, const struct fixed *to)
{
    const int64_t cols = layer->cols, block = fixed_block(layer), blocks = layer->group / block, groups = cols / layer->group;
    int16_t *numbers = to->numbers + row * cols;
    float *steps = to->steps + row * groups * blocks;
    for (int64_t g = 0, k = 0; g < groups; g++) {
        float sum = 0;
        for (int64_t b = 0; b < blocks; b++, k += block, steps++) {
            float total;
            *steps = fixed_of(x, half, row * cols + k, block, numbers + k, &total);
            sum += *steps * total;
        }
        to->sums[row * groups + g] = sum;
    }
}

/* A block of `rows` rows of x by the nibbles of `count` blocks of weights. */
INLINE void block_sums(const int16_t *x, int64_t cols, const uint8_t *weight, int64_t apart, int64_t ahead, int64_t block, ivec (*sum)[4], const int rows, const int count)
{
    for (int64_t k = 0; k < block; k += 8) {
        ivec w[4];
        UNROLL for (int b = 0; b < count; b++) {
            w[b] = i_held(i_load(weight + b * apart + k * 8));
            _mm_prefetch((const char *)weight + b * apart + k * 8 + ahead, _MM_HINT_T0);
        }
        UNROLL for (int i = 0; i < 4; i++) {
            ivec q[4];
            UNROLL for (int b = 0; b < count; b++) q[b] = i_nibbles(w[b], i);
            UNROLL for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, x + r * cols + k + 2 * i, sizeof two);
                UNROLL for (int b = 0; b < count; b++) sum[r][b] = i_dot_pairs(sum[r][b], i_pair(two), q[b]);
            }
        }
    }
}

INLINE void few_int4(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    const struct layer *layer = c->layer;
    const int64_t cols = layer->cols, wide = fixed_block(layer), parts = layer->group / wide, bytes = apart(c, block, count);
    const uint8_t *weight = layer->weight + block * c->block_bytes;
    vec total[FEW_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) total[r][b] = v_zero();
    for (int64_t g = 0; g < c->groups; g++, weight += c->group_bytes) {
        const int64_t ahead = ahead_of(c, g * c->group_bytes, count);
        vec here[FEW_ROWS][4];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) here[r][b] = v_zero();
        for (int64_t p = 0; p < parts; p++) {
            const int64_t at = g * layer->group + p * wide;
            ivec sum[FEW_ROWS][4];
            UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = i_zero();
            block_sums(c->fixed.numbers + m * cols + at, cols, weight + p * wide * 8, bytes, ahead, wide, sum, rows, count);
            UNROLL for (int r = 0; r < rows; r++) {
                const vec step = v_set(c->fixed.steps[(m + r) * c->groups * parts + g * parts + p]);
                UNROLL for (int b = 0; b < count; b++) here[r][b] = v_fma(i_float(sum[r][b]), step, here[r][b]);
            }
        }
        UNROLL for (int b = 0; b < count; b++) {
            const uint8_t *at = weight + b * bytes + layer->group * 8;
            const vec scale = group_number(c, at), point = group_number(c, at + 2 * LANES);
            UNROLL for (int r = 0; r < rows; r++)
                total[r][b] = v_fma(v_fnma(point, v_set(c->fixed.sums[(m + r) * c->groups + g]), here[r][b]), scale, total[r][b]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) finish(c, m + r, block + b, total[r][b]);
}

#endif
