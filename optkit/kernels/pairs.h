/* Many rows of x by int8 and int4 weights, both rounded to bfloat16: a strip of weights is turned once and serves all rows. */
#ifndef OPTKIT_PAIRS_H
#define OPTKIT_PAIRS_H
#include "panels.h"

#if defined(__AVX512BF16__)


/* Write 32 columns from k of a block as one tile of bfloat16: 16 column pairs of 16 weight rows. Columns beyond the last are zero. */
INLINE void tile_int8(const struct call *c, const uint8_t *weight, int64_t k, uint8_t *tile)
{
    const int64_t last = c->block_bytes / LANES; /* even */
    UNROLL for (int p = 0; p < 16; p++, k += 2, tile += 64) {
        __m512i low = _mm512_setzero_si512(), high = low;
        if (k < last) { /* an int8 is exact in the upper half of a float32 */
            low = _mm512_srli_epi32(_mm512_castps_si512(v_from_int8(weight + k * LANES)), 16);
            high = _mm512_castps_si512(v_from_int8(weight + (k + 1) * LANES));
        }
        _mm512_storeu_si512(tile, _mm512_or_si512(low, high));
    }
}

INLINE void tile_int4(const struct call *c, const uint8_t *weight, int64_t k, uint8_t *tile)
{
    const int64_t group = c->layer->group;
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xffff0000u);
    weight += (k / group) * c->group_bytes;
    vec scale = group_number(c, weight + group * 8), point = group_number(c, weight + group * 8 + 2 * LANES);
    vec zero = v_fnma(v_add(point, v_set(16.0f)), scale, v_zero()); /* w = (1 + q / 16) * 16 scale + zero */
    scale = v_mul(scale, v_set(16.0f));
    UNROLL for (int j = 0; j < 4; j++) {
        ivec w = i_load(weight + (k % group + 8 * j) * 8);
        UNROLL for (int i = 0; i < 4; i++, tile += 64) {
            vec even = v_fma(v_nibble(w, 4 * i), scale, zero), odd = v_fma(v_nibble(w, 4 * i + 16), scale, zero);
            __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
            __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
            _mm512_storeu_si512(tile, _mm512_ternarylogic_epi32(low, high, upper, 0xf8)); /* low | (high & upper) */
        }
    }
}

/* Tiles (depth, wide) of `count` blocks. */
static void strip(const struct call *c, int64_t block, int count, int wide, int64_t depth, uint8_t *tiles)
{
    for (int b = 0; b < count; b++) {
        const uint8_t *weight = c->layer->weight + (block + b) * c->block_bytes;
        for (int64_t d = 0; d < depth; d++)
            if (c->layer->group)
                tile_int4(c, weight, d * 32, tiles + (d * wide + b) * 1024);
            else
                tile_int8(c, weight, d * 32, tiles + (d * wide + b) * 1024);
    }
}

INLINE void pair_rows(const struct call *c, int64_t m, int64_t block, int64_t depth, const uint8_t *tiles, const int rows, const int count)
{
    const uint32_t *x = (const uint32_t *)c->rounded + m * depth * 16;
    vec sum[PANEL][WIDE];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) sum[r][b] = v_zero();
    for (int64_t d = 0; d < depth; d++, tiles += count * 1024)
        for (int64_t p = 0; p < 16; p++, x += rows) {
            __m512bh w[WIDE];
            UNROLL for (int b = 0; b < count; b++) w[b] = (__m512bh)_mm512_load_si512(tiles + b * 1024 + p * 64);
            UNROLL for (int r = 0; r < rows; r++) {
                __m512bh value = (__m512bh)_mm512_set1_epi32((int)x[r]);
                UNROLL for (int b = 0; b < count; b++) sum[r][b] = _mm512_dpbf16_ps(sum[r][b], value, w[b]);
            }
        }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int b = 0; b < count; b++) finish(c, m + r, block + b, sum[r][b]);
}

/* Panels [from, to) of x by blocks [block, end), whose weights are turned into bfloat16 once. */
static int pair_blocks(const struct call *c, int64_t block, int64_t end, int64_t from, int64_t to)
{
    const int64_t depth = (c->layer->cols + 31) / 32;
    uint8_t *tiles = aligned_alloc(64, (size_t)depth * WIDE * 1024);
    if (!tiles)
        return NO_MEMORY;
    memset(tiles, 0, (size_t)depth * WIDE * 1024);
    for (; block < end; block += WIDE) {
        strip(c, block, block + WIDE > c->blocks ? 1 : WIDE, WIDE, depth, tiles);
        for (int64_t p = from; p < to; p++) {
            const int64_t m = panel_start(c->m, p);
#define BODY(n) pair_rows(c, m, block, depth, tiles, n, WIDE)
            WITH_ROWS(panel_start(c->m, p + 1) - m, BODY)
#undef BODY
        }
    }
    free(tiles);
    return 0;
}

/* Rows [m, m + rows) of x as one panel of column pairs. */
static void pair_panel(const struct call *c, const void *x, int64_t m, int64_t rows, uint32_t *to)
{
    const int64_t cols = c->layer->cols, pairs = (cols + 31) / 32 * 16;
    uint32_t eight[8];
    for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < pairs * 2; k += LANES) {
            _mm256_storeu_si256((__m256i *)eight, v_to_bfloat16(load(x, (m + r) * cols + k, c->half, cols - k)));
            for (int64_t i = 0; i < 8; i++) to[m * pairs + (k / 2 + i) * rows + r] = eight[i];
        }
}

#endif
#endif
