/* A Llama-like decoder as the step of one token sees it, and the small mathematics of its layers. Shared with ctypes: keep the order of the fields. */
#ifndef OPTKIT_DECODER_H
#define OPTKIT_DECODER_H
#include "integers.h"
#include "peers.h"

struct dense { /* y = x w^T + b, by a packed weight or by a plain one */
    const struct layer *packed;
    const void *weight; /* (rows, cols), used where packed is NULL */
    const float *bias;  /* (rows) or NULL */
    int64_t rows, cols;
    int64_t half; /* the plain weight is bfloat16 */
};

struct block {
    const float *input_norm, *attention_norm; /* (hidden) */
    const float *query_norm, *key_norm;       /* (head_size) or NULL */
    struct dense query, key, value, output, gate, up, down;
    void *keys, *values; /* (batch, kv_heads, capacity, head_size): float32, or numbers of kv_bits; capacity counts places */
    uint16_t *key_scale, *key_low, *value_scale, *value_low; /* (batch, kv_heads, capacity, kv_groups) bfloat16, for such numbers */
    int64_t window; /* positions that are looked at; 0: all */
};

struct decoder {
    const struct block *blocks;
    const float *final_norm;
    const float *cosine, *sine; /* (positions, head_size) */
    struct dense head;
    int64_t depth, hidden, heads, kv_heads, head_size, widest, capacity, positions; /* widest: outputs of the widest gate */
    int64_t sinks, ring;        /* the first positions stay, later ones take turns in so many places; ring 0: all stay */
    struct peers *peers;        /* other processes with shares of the same layers, or NULL */
    int64_t kv_bits, kv_groups; /* 8, 4 or, for float32, 0; groups of channels in a head that share a scale */
    float epsilon, scale;
    uint64_t *ticks; /* (STAGES): where the first thread adds the ticks of each stage, or NULL */
};

/* The place of a position in the cache, and how many places are taken with it. */
INLINE int64_t place_of(const struct decoder *d, int64_t at) { return !d->ring || at < d->sinks ? at : d->sinks + (at - d->sinks) % d->ring; }
INLINE int64_t taken_with(const struct decoder *d, int64_t at) { return !d->ring || at < d->sinks + d->ring ? at + 1 : d->sinks + d->ring; }

enum stage { NORMS, PROJECTIONS, SCORES, FEED_FORWARD, HEAD, COMMUNICATION, STAGES };

/* Add what has passed since the last mark to a stage. */
INLINE void mark(uint64_t *ticks, uint64_t *last, enum stage stage)
{
    if (!ticks)
        return;
    const uint64_t now = __rdtsc();
    ticks[stage] += now - *last;
    *last = now;
}

INLINE vec exponential(vec x) /* Cephes expf: relative error below 2e-7 */
{
    x = v_max(v_min(x, v_set(88.0f)), v_set(-87.0f));
    vec n = v_round(v_mul(x, v_set(1.44269504088896341f)));
    vec r = v_fnma(n, v_set(-2.12194440e-4f), v_fnma(n, v_set(0.693359375f), x));
    vec p = v_set(1.9875691500e-4f);
    p = v_fma(p, r, v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_fma(p, v_mul(r, r), v_add(r, v_set(1.0f)));
    return v_power_of_two(p, n);
}

INLINE float dot(const float *a, const float *b, int64_t n)
{
    vec sum = v_zero();
    for (int64_t k = 0; k < n; k += LANES) sum = v_fma(v_load(a + k), v_load(b + k), sum);
    return v_sum(sum);
}

static void rms_norm(const float *x, const float *weight, int64_t n, float epsilon, float *to)
{
    const vec factor = v_set(1.0f / sqrtf(dot(x, x, n) / (float)n + epsilon));
    for (int64_t k = 0; k < n; k += LANES) v_store(to + k, v_mul(v_load(weight + k), v_mul(v_load(x + k), factor)));
}

/* x turned by the angles of its position; cosine and sine repeat for both halves. */
static void rotate(const float *x, const float *cosine, const float *sine, int64_t n, float *to)
{
    for (int64_t k = 0; k < n / 2; k++) {
        float low = x[k], high = x[k + n / 2];
        to[k] = low * cosine[k] - high * sine[k];
        to[k + n / 2] = high * cosine[k + n / 2] + low * sine[k + n / 2];
    }
}

#endif
