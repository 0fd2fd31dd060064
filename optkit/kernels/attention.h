/* Attention of one new position, over keys and values in float32 or in 8 or 4 bits.
 *
 * Packed keys and values are number * scale + low, with one scale and low for each position, head and group of channels; the law of the rounding
 * is that of kv.py. In 4 bits, the even channel is the low half of a byte: q and the result are kept with even channels before odd ones, 32 by 32.
 */
#ifndef OPTKIT_ATTENTION_H
#define OPTKIT_ATTENTION_H
#include "decoder.h"

enum { WIDEST_HEAD = 512, MOST_GROUPS = WIDEST_HEAD / LANES, TOGETHER = 128 }; /* TOGETHER: positions whose values stay in the cache */

INLINE uint16_t bfloat16_of(float x)
{
    uint16_t out[LANES];
    _mm256_storeu_si256((__m256i *)out, v_to_bfloat16(v_set(x)));
    return out[0];
}

INLINE float float_of(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Even channels before odd ones, 32 by 32; and back. */
INLINE void part_channels(const float *x, int64_t size, float *to)
{
    for (int64_t k = 0; k < size; k += 32)
        for (int64_t i = 0; i < 16; i++) to[k + i] = x[k + 2 * i], to[k + 16 + i] = x[k + 2 * i + 1];
}

INLINE void join_channels(const float *x, int64_t size, float *to)
{
    for (int64_t k = 0; k < size; k += 32)
        for (int64_t i = 0; i < 16; i++) to[k + 2 * i] = x[k + i], to[k + 2 * i + 1] = x[k + 16 + i];
}

/* Keys or values of one head of one sequence. */
struct kept {
    uint8_t *numbers; /* or float32 */
    uint16_t *scale, *low;
    int64_t row_bytes, groups, group; /* of one position; channels in a group */
    int bits;
};

INLINE struct kept kept_of(const struct decoder *d, void *numbers, uint16_t *scale, uint16_t *low, int64_t head)
{
    const int64_t size = d->head_size, groups = d->kv_bits ? d->kv_groups : 1, bytes = d->kv_bits ? size * d->kv_bits / 8 : size * 4;
    struct kept k = {(uint8_t *)numbers + head * d->capacity * bytes, scale, low, bytes, groups, size / groups, (int)d->kv_bits};
    if (d->kv_bits) k.scale += head * d->capacity * groups, k.low += head * d->capacity * groups;
    return k;
}

/* Keep the channels x of one position. */
static void keep(const struct kept *k, int64_t at, const float *x)
{
    uint8_t *to = k->numbers + at * k->row_bytes;
    if (!k->bits) {
        memcpy(to, x, (size_t)k->row_bytes);
        return;
    }
    const float levels = k->bits == 8 ? 255.0f : 15.0f;
    for (int64_t g = 0; g < k->groups; g++) {
        const float *from = x + g * k->group;
        vec most = v_load(from), least = most, wrong = v_zero();
        for (int64_t c = 0; c < k->group; c += LANES) {
            vec v = v_load(from + c);
            most = v_max(most, v), least = v_min(least, v), wrong = v_fma(v, v_zero(), wrong);
        }
        const float smallest = -v_largest(v_sub(v_zero(), least)), spoiled = v_sum(wrong);
        const uint16_t low = bfloat16_of(smallest - fabsf(smallest) * 0.00390625f);
        const float wide = (v_largest(most) - float_of(low)) / levels * 1.00390625f;
        const uint16_t scale = bfloat16_of((wide > 1e-30f ? wide : 1e-30f) + spoiled);
        k->low[at * k->groups + g] = bfloat16_of(float_of(low) + spoiled), k->scale[at * k->groups + g] = scale;
        for (int64_t c = 0; c < k->group; c++) {
            float number = rintf((from[c] - float_of(low)) / float_of(scale));
            number = number > levels ? levels : number > 0 ? number : 0; /* NaN becomes 0 */
            const int64_t channel = g * k->group + c;
            if (k->bits == 8)
                to[channel] = (uint8_t)number;
            else
                to[channel / 2] = channel % 2 ? (uint8_t)(to[channel / 2] | (uint8_t)number << 4) : (uint8_t)number;
        }
    }
}

/* 16 numbers of 8 bits; or the low (part 0) or high halves of 16 bytes. */
INLINE vec numbers_of(const uint8_t *p, const int bits, const int part)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    if (bits == 4) bytes = _mm_and_si128(part ? _mm_srli_epi16(bytes, 4) : bytes, _mm_set1_epi8(15));
    return v_from_bytes(bytes);
}

/* A query (head_size), parted for 4 bits, by the key of one position; sums: of the query, for each group. */
INLINE float score_of(const struct kept *k, int64_t at, const float *q, const float *sums, int64_t size, const int bits)
{
    const uint8_t *numbers = k->numbers + at * k->row_bytes;
    if (!bits)
        return dot(q, (const float *)numbers, size);
    float score = 0;
    for (int64_t g = 0; g < k->groups; g++) {
        vec sum = v_zero();
        for (int64_t c = g * k->group; c < (g + 1) * k->group; c += bits == 8 ? 16 : 32) {
            sum = v_fma(numbers_of(numbers + c * bits / 8, bits, 0), v_load(q + c), sum);
            if (bits == 4) sum = v_fma(numbers_of(numbers + c / 2, bits, 1), v_load(q + c + 16), sum);
        }
        score += v_sum(sum) * float_of(k->scale[at * k->groups + g]) + sums[g] * float_of(k->low[at * k->groups + g]);
    }
    return score;
}

/* `parts` times 16 channels from c on of out, plus those of the values of positions [from, to) by their shares. */
INLINE void add_channels(const struct kept *k, int64_t c, int64_t from, int64_t to, const float *shares, float *out, const int parts, const int bits)
{
    vec sum[4];
    UNROLL for (int p = 0; p < parts; p++) sum[p] = v_load(out + c + p * LANES);
    for (int64_t t = from; t < to; t++) {
        const uint8_t *numbers = k->numbers + t * k->row_bytes;
        const vec share = v_set(shares[t - from]);
        UNROLL for (int p = 0; p < parts; p++) {
            const int64_t at = c + p * LANES;
            if (!bits) {
                sum[p] = v_fma(share, v_load((const float *)numbers + at), sum[p]);
                continue;
            }
            const int64_t g = t * k->groups + at / k->group;
            const uint8_t *sixteen = bits == 8 ? numbers + at : numbers + at / 32 * 16;
            vec value = v_fma(numbers_of(sixteen, bits, at / 16 % 2), v_set(float_of(k->scale[g])), v_set(float_of(k->low[g])));
            sum[p] = v_fma(share, value, sum[p]);
        }
    }
    UNROLL for (int p = 0; p < parts; p++) v_store(out + c + p * LANES, sum[p]);
}

/* out (head_size), parted for 4 bits, plus the values of positions [from, to) by their shares. */
INLINE void add_values(const struct kept *k, int64_t from, int64_t to, const float *shares, float *out, int64_t size, const int bits)
{
    int64_t c = 0;
    for (; c + 4 * LANES <= size; c += 4 * LANES) add_channels(k, c, from, to, shares, out, 4, bits);
    for (; c < size; c += LANES) add_channels(k, c, from, to, shares, out, 1, bits);
}

/* scores (count) to shares that add up to 1. */
INLINE void softmax(float *scores, int64_t count)
{
    float most = -INFINITY;
    for (int64_t t = 0; t < count; t++) most = scores[t] > most ? scores[t] : most;
    vec total = v_zero();
    for (int64_t t = 0; t < count; t += LANES) {
        vec e = v_first(exponential(v_sub(v_load_first(scores + t, count - t), v_set(most))), count - t);
        v_store_first(scores + t, count - t, e);
        total = v_add(total, e);
    }
    const vec factor = v_set(1.0f / v_sum(total));
    for (int64_t t = 0; t < count; t += LANES) v_store_first(scores + t, count - t, v_mul(v_load_first(scores + t, count - t), factor));
}

/* What one thread needs for the query heads that share a head of keys. */
struct desk {
    float *queries; /* (heads / kv_heads, head_size) */
    float *scores;  /* (heads / kv_heads, capacity) */
};

INLINE void attend_by(const struct decoder *d, const struct kept *keys, const struct kept *values, int64_t from, int64_t at, int64_t heads,
                      const float (*sums)[MOST_GROUPS], const struct desk *desk, float *out, const int bits)
{
    const int64_t size = d->head_size;
    for (int64_t t = from; t <= at; t++)
        for (int64_t h = 0; h < heads; h++)
            desk->scores[h * d->capacity + t - from] = score_of(keys, t, desk->queries + h * size, sums[h], size, bits) * d->scale;
    for (int64_t h = 0; h < heads; h++) softmax(desk->scores + h * d->capacity, at - from + 1);
    memset(desk->queries, 0, (size_t)(heads * size) * sizeof(float));
    for (int64_t t = from; t <= at; t += TOGETHER)
        for (int64_t h = 0; h < heads; h++)
            add_values(values, t, t + TOGETHER <= at ? t + TOGETHER : at + 1, desk->scores + h * d->capacity + t - from, desk->queries + h * size, size, bits);
    for (int64_t h = 0; h < heads; h++)
        if (bits == 4)
            join_channels(desk->queries + h * size, size, out + h * size);
        else
            memcpy(out + h * size, desk->queries + h * size, (size_t)size * sizeof(float));
}

/* Query heads [first, last) of one sequence, which all share head kv of keys. Two threads may have heads of one kv: both keep the same bytes. */
static void attend(const struct decoder *d, const struct block *b, int64_t row, int64_t kv, int64_t first_head, int64_t last, int64_t at,
                   const float *query, const float *key, const float *value, const struct desk *desk, float *to)
{
    const int64_t size = d->head_size, from = b->window && at >= b->window ? at - b->window + 1 : 0, heads = last - first_head;
    const int64_t place = place_of(d, at), last_place = taken_with(d, at) - 1;
    const struct kept keys = kept_of(d, b->keys, b->key_scale, b->key_low, row * d->kv_heads + kv);
    const struct kept values = kept_of(d, b->values, b->value_scale, b->value_low, row * d->kv_heads + kv);
    const float *cosine = d->cosine + at * size, *sine = d->sine + at * size, *mine = key + (row * d->kv_heads + kv) * size;
    float normed[WIDEST_HEAD], turned[WIDEST_HEAD], sums[64][MOST_GROUPS];
    if (b->key_norm) rms_norm(mine, b->key_norm, size, d->epsilon, normed), mine = normed;
    rotate(mine, cosine, sine, size, turned);
    keep(&keys, place, turned);
    keep(&values, place, value + (row * d->kv_heads + kv) * size);
    for (int64_t h = 0; h < heads; h++) {
        const float *q = query + (row * d->heads + first_head + h) * size;
        if (b->query_norm) rms_norm(q, b->query_norm, size, d->epsilon, normed), q = normed;
        rotate(q, cosine, sine, size, turned);
        for (int64_t g = 0; d->kv_bits && g < keys.groups; g++) {
            vec sum = v_zero();
            for (int64_t c = g * keys.group; c < (g + 1) * keys.group; c += LANES) sum = v_add(sum, v_load(turned + c));
            sums[h][g] = v_sum(sum);
        }
        if (d->kv_bits == 4)
            part_channels(turned, size, desk->queries + h * size);
        else
            memcpy(desk->queries + h * size, turned, (size_t)size * sizeof(float));
    }
    float *out = to + (row * d->heads + first_head) * size;
    if (d->kv_bits == 8)
        attend_by(d, &keys, &values, from, last_place, heads, sums, desk, out, 8);
    else if (d->kv_bits == 4)
        attend_by(d, &keys, &values, from, last_place, heads, sums, desk, out, 4);
    else
        attend_by(d, &keys, &values, from, last_place, heads, sums, desk, out, 0);
}

#endif
