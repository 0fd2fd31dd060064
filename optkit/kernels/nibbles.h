/* Few rows of x by int4 weights.
 *
 * With AVX512-BF16, a pair of nibbles becomes a pair of bfloat16 in two operations, and x is the sum of two bfloat16: its highest 16 bits, where
 * float32 has 24. Without it, every nibble becomes a float32.
 */
#ifndef OPTKIT_NIBBLES_H
#define OPTKIT_NIBBLES_H
#include "call.h"

/* 16 scales or points of int4 groups. */
INLINE vec group_number(const struct call *c, const uint8_t *at)
{
    __m256i bits = _mm256_loadu_si256((const __m256i *)at);
    return c->layer->float16 ? v_from_float16(bits) : v_from_bfloat16(bits);
}

#if defined(__AVX512BF16__)

enum { SPLIT = 1 }; /* x is wanted as high and low */

/* 1 + q / 16 for a pair of columns of each dword: the nibbles i of its halves become the highest of the fractions of two bfloat16. */
INLINE __m512bh nibble_pair(ivec dwords, const int i)
{
    ivec moved = i ? _mm512_srli_epi32(dwords, 4 * i - 3) : _mm512_slli_epi32(dwords, 3);
    return (__m512bh)_mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(0x00780078), _mm512_set1_epi32(0x3f803f80), 0xea); /* a & b | c */
}

INLINE __m512bh column_pair(const uint16_t *x)
{
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

INLINE void group_sums(const struct call *c, int64_t m, int64_t g, const uint8_t *weight, vec (*sum)[4], const int rows, const int count, const int parts)
{
    const int64_t cols = c->layer->cols, group = c->layer->group, bytes = count > 1 ? c->apart : 0, ahead = ahead_of(c, g * c->group_bytes, count);
    const uint16_t *high = c->high + m * cols + g * group, *low = parts > 1 ? c->low + m * cols + g * group : NULL;
    for (int64_t k = 0; k < group; k += 8) {
        ivec w[4];
        UNROLL for (int b = 0; b < count; b++) {
            w[b] = i_held(i_load(weight + b * bytes + k * 8));
            _mm_prefetch((const char *)weight + b * bytes + k * 8 + ahead, _MM_HINT_T0);
        }
        UNROLL for (int i = 0; i < 4; i++) {
            __m512bh q[4];
            UNROLL for (int b = 0; b < count; b++) q[b] = nibble_pair(w[b], i);
            UNROLL for (int r = 0; r < rows; r++) {
                __m512bh x = column_pair(high + r * cols + k + 2 * i);
                UNROLL for (int b = 0; b < count; b++) sum[r][b] = _mm512_dpbf16_ps(sum[r][b], x, q[b]);
                if (parts == 1) continue;
                x = column_pair(low + r * cols + k + 2 * i);
                UNROLL for (int b = 0; b < count; b++) sum[r][b] = _mm512_dpbf16_ps(sum[r][b], x, q[b]);
            }
        }
    }
}

/* A row of x (cols) as high and low, and the sums of its groups. */
static void split_row(const struct layer *layer, const float *x, uint16_t *high, uint16_t *low, float *sums)
{
    for (int64_t g = 0; g < layer->cols / layer->group; g++) {
        vec sum = v_zero();
        for (int64_t k = g * layer->group; k < (g + 1) * layer->group; k += LANES) {
            vec value = v_load(x + k);
            __m256i upper = v_to_bfloat16(value), lower = v_to_bfloat16(v_sub(value, v_from_bfloat16(upper)));
            _mm256_storeu_si256((__m256i *)(high + k), upper);
            _mm256_storeu_si256((__m256i *)(low + k), lower);
            sum = v_add(sum, v_add(v_from_bfloat16(upper), v_from_bfloat16(lower)));
        }
        sums[g] = v_sum(sum);
    }
}

#else

enum { SPLIT = 0 };

INLINE void group_sums(const struct call *c, int64_t m, int64_t g, const uint8_t *weight, vec (*sum)[4], const int rows, const int count, const int parts)
{
    const int64_t cols = c->layer->cols, group = c->layer->group, bytes = count > 1 ? c->apart : 0, ahead = ahead_of(c, g * c->group_bytes, count);
    const float *x = c->x + m * cols + g * group;
    (void)parts;
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
}

#endif

INLINE void few_groups(const struct call *c, int64_t m, int64_t block, const int rows, const int count, const int parts)
{
    struct call mine = *c;
    mine.apart = apart(c, block, count);
    const int64_t bytes = mine.apart;
    const uint8_t *weight = c->layer->weight + block * c->block_bytes;
    vec total[FEW_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) total[r][b] = v_zero();
    for (int64_t g = 0; g < c->groups; g++, weight += c->group_bytes) {
        vec sum[FEW_ROWS][4];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = v_zero();
        group_sums(&mine, m, g, weight, sum, rows, count, parts);
        UNROLL for (int b = 0; b < count; b++) {
            const uint8_t *at = weight + b * bytes + c->layer->group * 8;
            vec scale = v_mul(group_number(c, at), v_set(16.0f)); /* the sum is of x times 1 + q / 16 */
            vec point = v_fma(group_number(c, at + 2 * LANES), v_set(0.0625f), v_set(1.0f));
            UNROLL for (int r = 0; r < rows; r++)
                total[r][b] = v_fma(v_fnma(point, v_set(c->sums[(m + r) * c->groups + g]), sum[r][b]), scale, total[r][b]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) finish(c, m + r, block + b, total[r][b]);
}


INLINE void few_int4(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    if (SPLIT && c->low)
        few_groups(c, m, block, rows, count, 2);
    else
        few_groups(c, m, block, rows, count, 1);
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
