/* AMX in plain C, slowly: what the tile instructions do, for machines without them. Read before the kernels' own source. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct emulated {
    uint8_t bytes[16][64];
};
static __thread struct emulated tile_state[8];

static inline float emulated_bfloat16(const uint8_t *at)
{
    uint16_t half;
    uint32_t bits;
    float value;
    memcpy(&half, at, 2);
    bits = (uint32_t)half << 16;
    memcpy(&value, &bits, 4);
    return value;
}

static inline void emulated_load(struct emulated *tile, const void *from, int64_t stride)
{
    for (int r = 0; r < 16; r++) memcpy(tile->bytes[r], (const uint8_t *)from + r * stride, 64);
}

static inline void emulated_store(const struct emulated *tile, void *to, int64_t stride)
{
    for (int r = 0; r < 16; r++) memcpy((uint8_t *)to + r * stride, tile->bytes[r], 64);
}

static inline void emulated_bfloat16_dot(struct emulated *sums, const struct emulated *a, const struct emulated *b)
{
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float sum;
            memcpy(&sum, sums->bytes[m] + 4 * n, 4);
            for (int k = 0; k < 32; k++) sum += emulated_bfloat16(a->bytes[m] + 2 * k) * emulated_bfloat16(b->bytes[k / 2] + 4 * n + 2 * (k % 2));
            memcpy(sums->bytes[m] + 4 * n, &sum, 4);
        }
}

static inline void emulated_int8_dot(struct emulated *sums, const struct emulated *a, const struct emulated *b)
{
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            int32_t sum;
            memcpy(&sum, sums->bytes[m] + 4 * n, 4);
            for (int k = 0; k < 64; k++) sum += (int8_t)a->bytes[m][k] * (int8_t)b->bytes[k / 4][4 * n + k % 4];
            memcpy(sums->bytes[m] + 4 * n, &sum, 4);
        }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_zero(t) memset(&tile_state[t], 0, sizeof tile_state[t])
#define _tile_loadd(t, from, stride) emulated_load(&tile_state[t], from, stride)
#define _tile_stored(t, to, stride) emulated_store(&tile_state[t], to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated_bfloat16_dot(&tile_state[sums], &tile_state[a], &tile_state[b])
#define _tile_dpbssd(sums, a, b) emulated_int8_dot(&tile_state[sums], &tile_state[a], &tile_state[b])
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define syscall(...) 0L
