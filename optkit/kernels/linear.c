/* Products of activations with packed int8 and int4 weights: y = x w^T (+ bias), with float32 sums, or int32 sums where x is rounded to int8.
 *
 * Few rows of float x are bound by memory: every weight is read once and turned in registers, int8 into float32, int4 into 16-bit integers, for
 * which x is rounded to 16 bits as well.
 * Many rows are bound by arithmetic: a strip of weights is turned into bfloat16 once and multiplied in tiles (AMX) or panels (AVX512-BF16), which
 * rounds x to bfloat16. Integer x goes through tiles, panels of AVX512-VNNI, or products of 16 bits; the sums are the same everywhere.
 *
 * Layout of the weights, in blocks of 16 output rows, so that each of the 16 lanes owns a row and no sum crosses lanes:
 *   int8  (blocks, cols rounded up to 4, 16) bytes
 *   int8 by integer x  (blocks, 16 * steps + 1, 16, 4) bytes, steps of 64 columns: for every 4 columns 16 rows; then 128 times each row's sum, int32
 *   int4  (blocks, groups, 8 * group_size + 64) bytes: for every 8 columns 16 dwords, one a row; then 16 scales and 16 points, in 16 bits.
 *         In a dword, nibble i of the low half is column 2 i, nibble i of the high half is column 2 i + 1.
 * Rows beyond the last are zero and never stored. No function keeps memory or state; all return 0, or a negative number for a refusal.
 */
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

static void widen_row(const uint16_t *x, int64_t cols, float *to)
{
    for (int64_t k = 0; k < cols; k += LANES) v_store_first(to + k, cols - k, load(x, k, 1, cols - k));
}

/* From how many rows on turning the weights once pays for itself; where there are no products of bfloat16, never. */
INLINE int64_t many_from(const struct layer *layer)
{
#if defined(__AMX_TILE__)
    return layer->group ? 8 : 6;
#elif defined(__AVX512BF16__)
    return layer->group ? 28 : 8;
#else
    (void)layer;
    return INT64_MAX;
#endif
}

static int run_few(struct call *c, const void *x, int threads)
{
    const size_t all = (size_t)(c->m * c->layer->cols);
    const int widened = c->half && !c->layer->group;
    float *wide = widened ? malloc(all * sizeof(float)) : NULL;
    void *fixed = c->layer->group ? malloc(fixed_bytes(c->layer, c->m)) : NULL;
    const int status = (widened && !wide) || (c->layer->group && !fixed) ? NO_MEMORY : 0;
    if (!status) {
        c->x = wide ? wide : x;
        if (fixed) c->fixed = fixed_in(c->layer, c->m, fixed);
#pragma omp parallel for num_threads(threads) if (c->m > FEW_ROWS && threads > 1)
        for (int64_t m = 0; m < c->m; m++) {
            if (wide) widen_row((const uint16_t *)x + m * c->layer->cols, c->layer->cols, wide + m * c->layer->cols);
            if (fixed) fixed_row(c->layer, x, c->half, m, &c->fixed);
        }
        const int64_t pairs = (c->blocks + 1) / 2;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
        for (int t = 0; t < threads; t++) {
            const int64_t end = pairs * (t + 1) / threads * 2;
            few_blocks(c, pairs * t / threads * 2, end < c->blocks ? end : c->blocks);
        }
    }
    free(wide);
    free(fixed);
    return status;
}

/* How x is rounded: into tiles where the machine has them and there are enough rows, else into panels. */
struct form {
    int tiles;
    int64_t units; /* tiles of 16 rows, or panels */
    size_t bytes, row_bytes;
};

static struct form form_of(const struct call *c)
{
    const int64_t step = c->layer->integer ? 64 : 32, steps = (c->layer->cols + step - 1) / step;
    struct form f = {0, panels_of(c->m), 0, (size_t)steps * 64};
#if defined(__AMX_TILE__)
    f.tiles = c->m >= many_from(c->layer);
    if (f.tiles) f.units = (c->m + 15) / 16;
#endif
    const size_t each = c->layer->integer && !f.tiles ? sizeof(quad) / 4 * f.row_bytes : f.row_bytes;
    f.bytes = (f.tiles ? (size_t)f.units * 16 : (size_t)c->m) * each;
    return f;
}

static void round_unit(const struct call *c, const struct form *f, const void *x, int64_t unit, void *to, float *scales, int8_t *row)
{
#if defined(__AMX_TILE__)
    if (f->tiles && c->layer->integer) {
        tile_of_integers(c, x, unit, to, scales, row);
        return;
    }
    if (f->tiles) {
        tile_of_rows(c, x, unit, to);
        return;
    }
#endif
    const int64_t m = panel_start(c->m, unit), rows = panel_start(c->m, unit + 1) - m;
    if (c->layer->integer)
        integer_panel(c, x, m, rows, to, scales, row);
#if defined(__AVX512BF16__)
    else
        pair_panel(c, x, m, rows, to);
#endif
    (void)f;
}

static int rounded_blocks(const struct call *c, const struct form *f, int64_t block, int64_t end, int64_t from, int64_t to)
{
#if defined(__AMX_TILE__)
    if (f->tiles)
        return tile_blocks(c, block, end, from, to);
#endif
    (void)f;
#if defined(__AVX512BF16__)
    if (!c->layer->integer)
        return pair_blocks(c, block, end, from, to);
#endif
    integer_blocks(c, block, end, from, to);
    return 0;
}

static int run_rounded(struct call *c, const void *x, int threads)
{
    const struct form f = form_of(c);
    const int64_t strips = (c->blocks + 3) / 4;
    void *rounded = aligned_alloc(64, (f.bytes + 63) / 64 * 64);
    float *scales = c->layer->integer ? malloc((size_t)c->m * sizeof(float)) : NULL;
    int8_t *rows = c->layer->integer ? aligned_alloc(64, f.row_bytes * (size_t)threads) : NULL;
    int status = rounded && (!c->layer->integer || (scales && rows)) ? 0 : NO_MEMORY;
    if (!status) {
        int64_t parts = threads <= strips ? 1 : (threads + strips - 1) / strips; /* narrow weights on many cores: split x as well */
        if (parts > (f.units + 7) / 8)
            parts = (f.units + 7) / 8;
        const int64_t across = threads / parts < strips ? threads / parts : strips;
#pragma omp parallel for schedule(static) num_threads(threads) if (c->m * c->layer->cols > ROUND_TOGETHER)
        for (int t = 0; t < threads; t++)
            for (int64_t u = f.units * t / threads; u < f.units * (t + 1) / threads; u++)
                round_unit(c, &f, x, u, rounded, scales, rows + (size_t)t * f.row_bytes);
        c->rounded = rounded, c->x_scale = scales;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(min : status)
        for (int64_t unit = 0; unit < across * parts; unit++) {
            const int64_t a = unit % across, p = unit / across;
            const int64_t block = strips * a / across * 4, end = strips * (a + 1) / across * 4;
            status = rounded_blocks(c, &f, block, end < c->blocks ? end : c->blocks, f.units * p / parts, f.units * (p + 1) / parts);
        }
    }
    free(rounded);
    free(scales);
    free(rows);
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
    return layer->integer || m >= many_from(layer) ? run_rounded(&c, x, threads) : run_few(&c, x, threads);
}

/* y (count, cols) = the rows of an int8 layer that ids name, scaled. */
int optkit_gather(const struct layer *layer, const int64_t *ids, void *y, int64_t count, int32_t half)
{
    const int64_t cols = layer->cols, bytes = (cols + 3) / 4 * 4 * LANES;
    for (int64_t t = 0; t < count; t++)
        if (ids[t] < 0 || ids[t] >= layer->rows)
            return OUT_OF_RANGE;
    for (int64_t t = 0; t < count; t++) {
        const int8_t *from = (const int8_t *)layer->weight + ids[t] / LANES * bytes + ids[t] % LANES;
        const vec scale = v_set(layer->scale[ids[t]]);
        for (int64_t k = 0; k < cols; k += LANES) {
            int64_t here = cols - k < LANES ? cols - k : LANES;
            int8_t row[LANES] __attribute__((aligned(16))) = {0};
            for (int64_t i = 0; i < here; i++) row[i] = from[(k + i) * LANES];
            store(y, t * cols + k, half, here, v_mul(v_from_int8((const uint8_t *)row), scale));
        }
    }
    return 0;
}

/* Ask the system for tiles in this process; 0 where they are granted. */
int optkit_request_amx(void) { return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */); }
