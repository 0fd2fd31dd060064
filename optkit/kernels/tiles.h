/* Rows of x in tiles of AMX: 16 rows by 64 bytes, multiplied by 16 rows of weights at a time. */
#ifndef OPTKIT_TILES_H
#define OPTKIT_TILES_H
#include "integers.h"
#include "pairs.h"

#if defined(__AMX_TILE__)

enum { TILE = 1024 };

INLINE void drain(const struct call *c, int64_t m, int64_t block, const void *sums)
{
    for (int r = 0; r < 16 && m + r < c->m; r++)
        finish(c, m + r, block, c->layer->integer ? i_float(i_load((const uint8_t *)sums + r * 64)) : v_load((const float *)sums + r * LANES));
}

#define FENCE __asm__ volatile("" ::: "memory") /* the tile intrinsics do not tell the compiler which memory they touch */
#define MULTIPLY(sum, x, w)              \
    if (integer) _tile_dpbssd(sum, x, w); \
    else _tile_dpbf16ps(sum, x, w)

/* Tiles of weights of one block stand `apart` bytes from one another. */
struct strip {
    const uint8_t *block[2];
    int64_t apart;
};

/* 16 * high rows of x by 16 * wide rows of weights, over the whole depth. */
INLINE void tile_rows_by(const struct call *c, int64_t m, int64_t block, int64_t depth, const struct strip *w, const int high, const int wide, const int integer)
{
    const uint8_t *x = (const uint8_t *)c->rounded + m / 16 * depth * TILE;
    uint8_t sums[TILE] __attribute__((aligned(64)));
    _tile_zero(0);
    if (wide > 1) _tile_zero(1);
    if (high > 1) _tile_zero(2);
    if (high > 1 && wide > 1) _tile_zero(3);
    FENCE;
    for (int64_t d = 0; d < depth; d++) {
        _tile_loadd(4, x + d * TILE, 64);
        _tile_loadd(6, w->block[0] + d * w->apart, 64);
        MULTIPLY(0, 4, 6);
        if (wide > 1) {
            _tile_loadd(7, w->block[1] + d * w->apart, 64);
            MULTIPLY(1, 4, 7);
        }
        if (high > 1) {
            _tile_loadd(5, x + (depth + d) * TILE, 64);
            MULTIPLY(2, 5, 6);
            if (wide > 1) {
                MULTIPLY(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, 64);
    FENCE;
    drain(c, m, block, sums);
    if (wide > 1) {
        _tile_stored(1, sums, 64);
        FENCE;
        drain(c, m, block + 1, sums);
    }
    if (high > 1) {
        _tile_stored(2, sums, 64);
        FENCE;
        drain(c, m + 16, block, sums);
    }
    if (high > 1 && wide > 1) {
        _tile_stored(3, sums, 64);
        FENCE;
        drain(c, m + 16, block + 1, sums);
    }
}

INLINE void tile_column(const struct call *c, int64_t block, int64_t from, int64_t to, int64_t depth, const struct strip *w, const int wide, const int integer)
{
    int64_t t = from;
    for (; t + 2 <= to; t += 2) tile_rows_by(c, t * 16, block, depth, w, 2, wide, integer);
    if (t < to) tile_rows_by(c, t * 16, block, depth, w, 1, wide, integer);
}

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Row tiles [from, to) of x by blocks [block, end), two at a time. Weights of 8 bits by integer x stand in tiles already. */
static int tile_blocks(const struct call *c, int64_t block, int64_t end, int64_t from, int64_t to)
{
    const int integer = (int)c->layer->integer;
    const int64_t depth = integer ? quads_of(c->layer) / 16 : (c->layer->cols + 31) / 32;
    uint8_t *tiles = integer ? NULL : aligned_alloc(64, (size_t)depth * 2 * TILE);
    if (!integer && !tiles)
        return NO_MEMORY;
    struct tile_config config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.row_bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
    while (block < end) {
        const int wide = end - block > 1 ? 2 : 1;
        struct strip w = {{tiles, tiles + TILE}, wide * TILE};
        if (integer) {
            const uint8_t *weight = c->layer->weight + block * c->block_bytes;
            w = (struct strip){{weight, weight + c->block_bytes}, TILE};
            if (wide > 1)
                tile_column(c, block, from, to, depth, &w, 2, 1);
            else
                tile_column(c, block, from, to, depth, &w, 1, 1);
        } else {
            strip(c, block, wide, wide, depth, tiles);
            FENCE;
            if (wide > 1)
                tile_column(c, block, from, to, depth, &w, 2, 0);
            else
                tile_column(c, block, from, to, depth, &w, 1, 0);
        }
        block += wide;
    }
    _tile_release();
    free(tiles);
    return 0;
}

/* Round 16 rows of x to bfloat16, in tiles of 32 columns; rows and columns beyond the last are zero. */
static void tile_of_rows(const struct call *c, const void *x, int64_t tile, uint16_t *to)
{
    const int64_t cols = c->layer->cols, depth = (cols + 31) / 32;
    to += tile * depth * 512;
    for (int64_t r = 0; r < 16; r++)
        for (int64_t k = 0; k < depth * 32; k += LANES) {
            const int64_t row = tile * 16 + r;
            vec value = row < c->m && k < cols ? load(x, row * cols + k, c->half, cols - k) : v_zero();
            _mm256_storeu_si256((__m256i *)(to + k / 32 * 512 + r * 32 + k % 32), v_to_bfloat16(value));
        }
}

/* Round 16 rows of x to int8, in tiles of 64 columns; bytes: room for a row. */
static void tile_of_integers(const struct call *c, const void *x, int64_t tile, int8_t *to, float *scales, int8_t *bytes)
{
    const int64_t depth = quads_of(c->layer) / 16;
    to += tile * depth * TILE;
    for (int64_t r = 0; r < 16; r++) {
        const int64_t row = tile * 16 + r;
        if (row < c->m)
            scales[row] = round_row(c->layer, x, c->half, row * c->layer->cols, bytes);
        else
            memset(bytes, 0, (size_t)depth * 64);
        for (int64_t d = 0; d < depth; d++) memcpy(to + d * TILE + r * 64, bytes + d * 64, 64);
    }
}

#endif
#endif
