/* Few rows of x by packed weights, in registers: the loops that steps of one token are made of. The layout is told in linear.c. */
#ifndef OPTKIT_FEW_H
#define OPTKIT_FEW_H
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define AVX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))
#define UNROLL _Pragma("GCC unroll 16")

enum { LANES = 16, AHEAD = 2048, FEW_ROWS = 8, WORK_PER_THREAD = 1 << 16, ROUND_TOGETHER = 1 << 18 };
enum { NO_MEMORY = -1, OUT_OF_RANGE = -2 };

/* Shared with ctypes: keep the order of the fields. */
struct layer {
    const uint8_t *weight;
    const float *scale;  /* int8: one a row. int4: unused */
    int64_t rows, cols;  /* of the weight: out_features, in_features */
    int64_t group;       /* columns in a group; 0 for int8 */
    int64_t many_from;   /* from so many rows of x on, tiles are used */
    int64_t float16;     /* int4: scales and points are float16, else bfloat16 */
};

struct call {
    const struct layer *layer;
    const float *x;     /* (m, cols) */
    const float *sums;  /* (m, groups): sums of x, int4 only */
    const uint16_t *tiles;
    const void *bias;
    void *y;
    int64_t m, blocks, block_bytes, groups, group_bytes;
    int32_t bias_half, half; /* 1: bfloat16, 0: float32 */
};

INLINE AVX __m512 widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

INLINE AVX __m256i narrow(__m512 value)
{
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
}

INLINE AVX __m512 load(const void *from, int64_t at, int half, __mmask16 mask)
{
    if (half)
        return widen(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at));
    return _mm512_maskz_loadu_ps(mask, (const float *)from + at);
}

INLINE AVX void store(void *to, int64_t at, int half, __mmask16 mask, __m512 value)
{
    if (half)
        _mm256_mask_storeu_epi16((uint16_t *)to + at, mask, narrow(value));
    else
        _mm512_mask_storeu_ps((float *)to + at, mask, value);
}

INLINE __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

/* Scale (int8), add the bias and store 16 results of row m. */
INLINE AVX void finish(const struct call *c, int64_t m, int64_t block, __m512 sum)
{
    int64_t row = block * LANES;
    __mmask16 mask = first(c->layer->rows - row);
    if (c->layer->scale)
        sum = _mm512_mul_ps(sum, _mm512_maskz_loadu_ps(mask, c->layer->scale + row));
    if (c->bias)
        sum = _mm512_add_ps(sum, load(c->bias, row, c->bias_half, mask));
    store(c->y, m * c->layer->rows + row, c->half, mask, sum);
}

INLINE AVX __m512 integers(const uint8_t *at) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at))); }

/* `rows` rows of x by `count` blocks of weights; both are constants after inlining. */
INLINE AVX void few_int8(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    const int64_t cols = c->layer->cols, bytes = c->block_bytes;
    const uint8_t *weight = c->layer->weight + block * bytes;
    const float *x = c->x + m * cols;
    __m512 sum[FEW_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 4 <= cols; k += 4) {
        UNROLL for (int b = 0; b < count; b++) _mm_prefetch((const char *)weight + b * bytes + k * LANES + AHEAD, _MM_HINT_T0);
        UNROLL for (int i = 0; i < 4; i++) {
            __m512 w[4];
            UNROLL for (int b = 0; b < count; b++) w[b] = integers(weight + b * bytes + (k + i) * LANES);
            UNROLL for (int r = 0; r < rows; r++) {
                __m512 value = _mm512_set1_ps(x[r * cols + k + i]);
                UNROLL for (int b = 0; b < count; b++) sum[r][b] = _mm512_fmadd_ps(w[b], value, sum[r][b]);
            }
        }
    }
    for (; k < cols; k++)
        UNROLL for (int r = 0; r < rows; r++) {
            __m512 value = _mm512_set1_ps(x[r * cols + k]);
            UNROLL for (int b = 0; b < count; b++) sum[r][b] = _mm512_fmadd_ps(integers(weight + b * bytes + k * LANES), value, sum[r][b]);
        }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) finish(c, m + r, block + b, sum[r][b]);
}

/* 16 scales or points of int4 groups. */
INLINE AVX __m512 group_number(const struct call *c, const uint8_t *at)
{
    __m256i bits = _mm256_loadu_si256((const __m256i *)at);
    return c->layer->float16 ? _mm512_cvtph_ps(bits) : widen(bits);
}

INLINE AVX __m512 numbers(void) { return _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }

INLINE AVX void few_int4(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    const int64_t cols = c->layer->cols, group = c->layer->group, bytes = c->block_bytes;
    const uint8_t *weight = c->layer->weight + block * bytes;
    const __m512 table = numbers();
    __m512 total[FEW_ROWS][4];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) total[r][b] = _mm512_setzero_ps();
    for (int64_t g = 0; g < c->groups; g++, weight += c->group_bytes) {
        const float *x = c->x + m * cols + g * group;
        __m512 sum[FEW_ROWS][4];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = _mm512_setzero_ps();
        for (int64_t k = 0; k < group; k += 8) {
            __m512i w[4];
            UNROLL for (int b = 0; b < count; b++) {
                w[b] = _mm512_loadu_si512(weight + b * bytes + k * 8);
                _mm_prefetch((const char *)weight + b * bytes + k * 8 + AHEAD, _MM_HINT_T0);
            }
            UNROLL for (int i = 0; i < 8; i++) { /* the permutation looks at the lowest 4 bits of each lane alone */
                __m512 q[4];
                UNROLL for (int b = 0; b < count; b++) q[b] = _mm512_permutexvar_ps(_mm512_srli_epi32(w[b], 4 * (i / 2) + 16 * (i % 2)), table);
                UNROLL for (int r = 0; r < rows; r++) {
                    __m512 value = _mm512_set1_ps(x[r * cols + k + i]);
                    UNROLL for (int b = 0; b < count; b++) sum[r][b] = _mm512_fmadd_ps(q[b], value, sum[r][b]);
                }
            }
        }
        UNROLL for (int b = 0; b < count; b++) {
            const uint8_t *at = weight + b * bytes + group * 8;
            __m512 scale = group_number(c, at), point = group_number(c, at + 2 * LANES);
            UNROLL for (int r = 0; r < rows; r++)
                total[r][b] = _mm512_fmadd_ps(_mm512_fnmadd_ps(point, _mm512_set1_ps(c->sums[(m + r) * c->groups + g]), sum[r][b]), scale, total[r][b]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) finish(c, m + r, block + b, total[r][b]);
}

INLINE AVX void few(const struct call *c, int64_t m, int64_t block, const int rows, const int count)
{
    if (c->layer->group)
        few_int4(c, m, block, rows, count);
    else
        few_int8(c, m, block, rows, count);
}

/* All rows of x by `count` blocks: the blocks stay in the cache while x passes by. */
#define FEW(count, most)                                                      \
    static AVX void few_##count(const struct call *c, int64_t block)          \
    {                                                                         \
        int64_t m = 0;                                                        \
        for (; most == 8 && m + 8 <= c->m; m += 8) few(c, m, block, most, count); \
        for (; m + 4 <= c->m; m += 4) few(c, m, block, 4, count);             \
        switch (c->m - m) {                                                   \
        case 1: few(c, m, block, 1, count); break;                            \
        case 2: few(c, m, block, 2, count); break;                            \
        case 3: few(c, m, block, 3, count); break;                            \
        }                                                                     \
    }
FEW(4, 4)
FEW(2, 8)
FEW(1, 8)

static AVX void few_blocks(const struct call *c, int64_t block, int64_t end)
{
    for (; c->m < FEW_ROWS && block + 4 <= end; block += 4) few_4(c, block);
    for (; block + 2 <= end; block += 2) few_2(c, block);
    for (; block < end; block++) few_1(c, block);
}

/* What follows from the sizes of a layer. */
INLINE struct call call_of(const struct layer *layer, int64_t m)
{
    struct call c = {.layer = layer, .m = m};
    c.blocks = (layer->rows + LANES - 1) / LANES;
    c.groups = layer->group ? layer->cols / layer->group : 0;
    c.group_bytes = layer->group * 8 + 64;
    c.block_bytes = layer->group ? c.groups * c.group_bytes : (layer->cols + 3) / 4 * 4 * LANES;
    return c;
}

static AVX void sum_groups(const float *x, int64_t groups, int64_t group, float *to)
{
    for (int64_t g = 0; g < groups; g++, x += group) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < group; k += LANES) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + k));
        to[g] = _mm512_reduce_add_ps(sum);
    }
}

#endif
