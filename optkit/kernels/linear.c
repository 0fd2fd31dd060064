/* Products of float activations with packed int8 and int4 weights: y = x w^T (+ bias), with float32 sums.
 *
 * Few rows of x are bound by memory: every weight is read once, turned into float32 in registers and multiplied there (AVX-512).
 * Many rows are bound by arithmetic: a strip of weights is turned into bfloat16 once and multiplied in tiles (AMX), which rounds x to bfloat16.
 *
 * Layout of the weights, in blocks of 16 output rows, so that each of the 16 lanes of a register owns a row and no sum crosses lanes:
 *   int8  (blocks, cols rounded up to 4, 16) bytes
 *   int4  (blocks, groups, 8 * group_size + 64) bytes: for every 8 columns 16 dwords, one a row; then 16 scales and 16 points, in 16 bits.
 *         In a dword, nibble i of the low half is column 2 i, nibble i of the high half is column 2 i + 1.
 * Rows beyond the last are zero and never stored. No function keeps memory or state; all return 0, or a negative number for a refusal.
 */
#include <sys/syscall.h>
#include <unistd.h>

#include "few.h"

/* Write 32 columns from k of a block as one tile of bfloat16: 16 rows of column pairs by 16 weight rows. Columns beyond the last are zero. */
INLINE AMX void tile_int8(const struct call *c, const uint8_t *weight, int64_t k, uint8_t *tile)
{
    const int64_t last = c->block_bytes / LANES; /* even */
    UNROLL for (int p = 0; p < 16; p++, k += 2, tile += 64) {
        __m512i low = _mm512_setzero_si512(), high = low;
        if (k < last) { /* an int8 is exact in the upper half of a float32 */
            low = _mm512_srli_epi32(_mm512_castps_si512(integers(weight + k * LANES)), 16);
            high = _mm512_castps_si512(integers(weight + (k + 1) * LANES));
        }
        _mm512_storeu_si512(tile, _mm512_or_si512(low, high));
    }
}

INLINE AMX void tile_int4(const struct call *c, const uint8_t *weight, int64_t k, uint8_t *tile)
{
    const int64_t group = c->layer->group;
    const __m512 table = numbers();
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xffff0000u);
    weight += (k / group) * c->group_bytes;
    __m512 scale = group_number(c, weight + group * 8), point = group_number(c, weight + group * 8 + 2 * LANES);
    __m512 zero = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(point, scale)); /* what 0 stands for */
    UNROLL for (int j = 0; j < 4; j++) {
        __m512i w = _mm512_loadu_si512(weight + (k % group + 8 * j) * 8);
        UNROLL for (int i = 0; i < 4; i++, tile += 64) {
            __m512 even = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * i), table), scale, zero);
            __m512 odd = _mm512_fmadd_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(w, 4 * i + 16), table), scale, zero);
            __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
            __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
            _mm512_storeu_si512(tile, _mm512_ternarylogic_epi32(low, high, upper, 0xf8)); /* low | (high & upper) */
        }
    }
}

static AMX void strip(const struct call *c, int64_t block, int count, int64_t depth, uint8_t *tiles)
{
    for (int b = 0; b < count; b++) {
        const uint8_t *weight = c->layer->weight + (block + b) * c->block_bytes;
        for (int64_t d = 0; d < depth; d++)
            if (c->layer->group)
                tile_int4(c, weight, d * 32, tiles + (d * count + b) * 1024);
            else
                tile_int8(c, weight, d * 32, tiles + (d * count + b) * 1024);
    }
}

INLINE AMX void drain(const struct call *c, int64_t m, int64_t block, const float *sums)
{
    for (int r = 0; r < 16 && m + r < c->m; r++) finish(c, m + r, block, _mm512_loadu_ps(sums + r * LANES));
}

#define FENCE __asm__ volatile("" ::: "memory") /* the tile intrinsics do not tell the compiler which memory they touch */

/* 16 * high rows of x by 16 * wide rows of weights, over the whole depth. */
INLINE AMX void many(const struct call *c, int64_t m, int64_t block, int64_t depth, const uint8_t *weights, const int high, const int wide)
{
    const uint8_t *x = (const uint8_t *)c->tiles + m / 16 * depth * 1024;
    float sums[16 * LANES] __attribute__((aligned(64)));
    _tile_zero(0);
    if (wide > 1) _tile_zero(1);
    if (high > 1) _tile_zero(2);
    if (high > 1 && wide > 1) _tile_zero(3);
    FENCE;
    for (int64_t d = 0; d < depth; d++) {
        _tile_loadd(4, x + d * 1024, 64);
        _tile_loadd(6, weights + d * wide * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (wide > 1) {
            _tile_loadd(7, weights + (d * wide + 1) * 1024, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (high > 1) {
            _tile_loadd(5, x + (depth + d) * 1024, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (wide > 1) _tile_dpbf16ps(3, 5, 7);
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

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Blocks [block, end) in strips of two, by the row tiles [from, to) of x. */
static AMX int many_blocks(const struct call *c, int64_t block, int64_t end, int64_t from, int64_t to)
{
    const int64_t depth = (c->layer->cols + 31) / 32;
    uint8_t *tiles = aligned_alloc(64, depth * 2048);
    if (!tiles)
        return NO_MEMORY;
    struct tile_config config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.row_bytes[t] = 64, config.rows[t] = 16;
    _tile_loadconfig(&config);
    while (block < end) {
        const int wide = end - block > 1 ? 2 : 1;
        strip(c, block, wide, depth, tiles);
        FENCE;
        int64_t t = from;
        for (; t + 2 <= to; t += 2)
            if (wide > 1)
                many(c, t * 16, block, depth, tiles, 2, 2);
            else
                many(c, t * 16, block, depth, tiles, 2, 1);
        if (t < to) {
            if (wide > 1)
                many(c, t * 16, block, depth, tiles, 1, 2);
            else
                many(c, t * 16, block, depth, tiles, 1, 1);
        }
        block += wide;
    }
    _tile_release();
    free(tiles);
    return 0;
}

/* Round 16 rows of x to bfloat16, in tiles of 32 columns; rows and columns beyond the last are zero. */
static AVX void tile_rows(const void *x, int half, int64_t m, int64_t cols, int64_t tile, uint16_t *to)
{
    const int64_t depth = (cols + 31) / 32;
    to += tile * depth * 512;
    for (int64_t r = 0; r < 16; r++)
        for (int64_t k = 0; k < depth * 32; k += LANES) {
            int64_t row = tile * 16 + r;
            __m512 value = row < m && k < cols ? load(x, row * cols + k, half, first(cols - k)) : _mm512_setzero_ps();
            _mm256_storeu_si256((__m256i *)(to + k / 32 * 512 + r * 32 + k % 32), narrow(value));
        }
}

static AVX void widen_row(const uint16_t *x, int64_t cols, float *to)
{
    for (int64_t k = 0; k < cols; k += LANES) {
        __mmask16 mask = first(cols - k);
        _mm512_mask_storeu_ps(to + k, mask, load(x, k, 1, mask));
    }
}

static int run_few(struct call *c, const void *x, int threads)
{
    const int64_t cols = c->layer->cols, group = c->layer->group;
    float *wide = NULL, *sums = NULL;
    if (c->half && !(wide = malloc(c->m * cols * sizeof(float))))
        return NO_MEMORY;
    if (group && !(sums = malloc(c->m * c->groups * sizeof(float)))) {
        free(wide);
        return NO_MEMORY;
    }
    c->x = wide ? wide : x;
    c->sums = sums;
#pragma omp parallel for num_threads(threads) if (c->m > FEW_ROWS && threads > 1)
    for (int64_t m = 0; m < c->m; m++) {
        if (wide) widen_row((const uint16_t *)x + m * cols, cols, wide + m * cols);
        if (sums) sum_groups(c->x + m * cols, c->groups, group, sums + m * c->groups);
    }
    if (threads > 1) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int t = 0; t < threads; t++) few_blocks(c, c->blocks * t / threads, c->blocks * (t + 1) / threads);
    } else
        few_blocks(c, 0, c->blocks);
    free(wide);
    free(sums);
    return 0;
}

static int run_many(struct call *c, const void *x, int threads)
{
    const int64_t cols = c->layer->cols, depth = (cols + 31) / 32, high = (c->m + 15) / 16, strips = (c->blocks + 1) / 2;
    uint16_t *tiles = aligned_alloc(64, high * depth * 1024);
    if (!tiles)
        return NO_MEMORY;
    int64_t parts = threads <= strips ? 1 : (threads + strips - 1) / strips; /* narrow weights on many cores: split x as well */
    if (parts > (high + 7) / 8)
        parts = (high + 7) / 8;
    int64_t across = threads / parts < strips ? threads / parts : strips;
    int status = 0;
#pragma omp parallel for num_threads(threads) if (c->m * cols > ROUND_TOGETHER)
    for (int64_t t = 0; t < high; t++) tile_rows(x, c->half, c->m, cols, t, tiles);
    c->tiles = tiles;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(min : status)
    for (int64_t unit = 0; unit < across * parts; unit++) {
        int64_t a = unit % across, p = unit / across;
        int64_t block = strips * a / across * 2, end = strips * (a + 1) / across * 2;
        status = many_blocks(c, block, end < c->blocks ? end : c->blocks, high * p / parts, high * (p + 1) / parts);
    }
    free(tiles);
    return status;
}

/* y (m, rows) = x (m, cols) by the layer, plus bias (rows) or NULL. halves: 1 if x and y are bfloat16, plus 2 if the bias is; else float32. */
int optkit_linear(const struct layer *layer, const void *x, const void *bias, void *y, int64_t m, int32_t halves, int32_t threads)
{
    struct call c = call_of(layer, m);
    c.bias = bias, c.y = y, c.half = halves & 1, c.bias_half = halves >> 1;
    int64_t most = m * layer->rows * layer->cols / WORK_PER_THREAD + 1;
    if (threads > most) threads = (int32_t)most;
    if (threads > c.blocks) threads = (int32_t)c.blocks;
    if (m == 0 || threads < 1)
        return 0;
    return m >= layer->many_from ? run_many(&c, x, threads) : run_few(&c, x, threads);
}

/* y (count, cols) = the rows of an int8 layer that ids name, scaled. */
AVX int optkit_gather(const struct layer *layer, const int64_t *ids, void *y, int64_t count, int32_t half)
{
    const int64_t cols = layer->cols, bytes = (cols + 3) / 4 * 4 * LANES;
    for (int64_t t = 0; t < count; t++)
        if (ids[t] < 0 || ids[t] >= layer->rows)
            return OUT_OF_RANGE;
    for (int64_t t = 0; t < count; t++) {
        const int8_t *from = (const int8_t *)layer->weight + ids[t] / LANES * bytes + ids[t] % LANES;
        const __m512 scale = _mm512_set1_ps(layer->scale[ids[t]]);
        for (int64_t k = 0; k < cols; k += LANES) {
            int64_t here = cols - k < LANES ? cols - k : LANES;
            int8_t row[LANES] __attribute__((aligned(16))) = {0};
            for (int64_t i = 0; i < here; i++) row[i] = from[(k + i) * LANES];
            store(y, t * cols + k, half, first(here), _mm512_mul_ps(integers((const uint8_t *)row), scale));
        }
    }
    return 0;
}

/* Ask the system for tiles in this process; 0 where they are granted. */
int optkit_request_amx(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }
