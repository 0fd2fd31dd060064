/* One step of a Llama-like decoder for a few sequences, from token ids to logits, in one parallel region.
 *
 * Threads share every product by output rows and wait for one another four times a block. Activations, keys and values are float32.
 * Norms are computed by every thread for itself: that is cheaper than a wait.
 */
#include <omp.h>

#include "integers.h"

/* Shared with ctypes: keep the order of the fields. */
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
    float *keys, *values; /* (batch, kv_heads, capacity, head_size) */
    int64_t window;       /* positions that are looked at; 0: all */
};

struct decoder {
    const struct block *blocks;
    const float *final_norm;
    const float *cosine, *sine; /* (capacity, head_size) */
    struct dense head;
    int64_t depth, hidden, heads, kv_heads, head_size, widest, capacity; /* widest: outputs of the widest gate */
    float epsilon, scale;
};

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

static void plain_rows(const struct dense *d, const float *x, float *y, int64_t m, int64_t from, int64_t to)
{
    const int half = (int)d->half;
    for (int64_t r = from; r < to; r++)
        for (int64_t i = 0; i < m; i++) {
            vec a = v_zero(), b = a;
            int64_t k = 0;
            for (; k + 2 * LANES <= d->cols; k += 2 * LANES) {
                a = v_fma(load(d->weight, r * d->cols + k, half, LANES), v_load(x + i * d->cols + k), a);
                b = v_fma(load(d->weight, r * d->cols + k + LANES, half, LANES), v_load(x + i * d->cols + k + LANES), b);
            }
            for (; k < d->cols; k += LANES)
                a = v_fma(load(d->weight, r * d->cols + k, half, d->cols - k), v_load_first(x + i * d->cols + k, d->cols - k), a);
            y[i * d->rows + r] = v_sum(v_add(a, b)) + (d->bias ? d->bias[r] : 0.0f);
        }
}

struct team {
    int number, size;
    float *sums;  /* (m, most groups) for this thread alone, as the following */
    void *panels; /* x in int8 */
    float *scales;
    int8_t *bytes;
};

struct range {
    int64_t from, to;
};

/* The outputs that a thread computes: pairs of blocks, and so the same for packed and plain weights. */
INLINE struct range share(int64_t rows, const struct team *team)
{
    const int64_t pair = 2 * LANES, pairs = (rows + pair - 1) / pair;
    struct range found = {pairs * team->number / team->size * pair, pairs * (team->number + 1) / team->size * pair};
    if (found.from > rows) found.from = rows;
    if (found.to > rows) found.to = rows;
    return found;
}

static void apply(const struct dense *d, const float *x, float *y, int64_t m, const struct team *team)
{
    struct range mine = share(d->rows, team);
    if (!d->packed) {
        plain_rows(d, x, y, m, mine.from, mine.to);
        return;
    }
    struct call c = call_of(d->packed, m);
    c.x = x, c.y = y, c.bias = d->bias;
    const int64_t block = mine.from / LANES, end = (mine.to + LANES - 1) / LANES;
    if (d->packed->integer) {
        for (int64_t p = 0; p < panels_of(m); p++) {
            const int64_t start = panel_start(m, p);
            integer_panel(&c, x, start, panel_start(m, p + 1) - start, team->panels, team->scales, team->bytes);
        }
        c.rounded = team->panels, c.x_scale = team->scales;
        integer_blocks(&c, block, end, 0, panels_of(m));
        return;
    }
    if (d->packed->group) {
        for (int64_t i = 0; i < m; i++) sum_groups(x + i * d->cols, c.groups, d->packed->group, team->sums + i * c.groups);
        c.sums = team->sums;
    }
    few_blocks(&c, block, end);
}

/* Attention of all query heads that share one head of keys, for one sequence. */
static void attend(const struct decoder *d, const struct block *b, int64_t row, int64_t kv, int64_t at, const float *query, const float *key,
                       const float *value, float *scores, float *to)
{
    const int64_t size = d->head_size, group = d->heads / d->kv_heads, from = b->window && at >= b->window ? at - b->window + 1 : 0;
    float *keys = b->keys + (row * d->kv_heads + kv) * d->capacity * size, *values = b->values + (row * d->kv_heads + kv) * d->capacity * size;
    float normed[512], turned[512];
    const float *cosine = d->cosine + at * size, *sine = d->sine + at * size;
    const float *mine = key + (row * d->kv_heads + kv) * size;
    if (b->key_norm) rms_norm(mine, b->key_norm, size, d->epsilon, normed), mine = normed;
    rotate(mine, cosine, sine, size, keys + at * size);
    memcpy(values + at * size, value + (row * d->kv_heads + kv) * size, size * sizeof(float));
    for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
        const float *q = query + (row * d->heads + h) * size;
        if (b->query_norm) rms_norm(q, b->query_norm, size, d->epsilon, normed), q = normed;
        rotate(q, cosine, sine, size, turned);
        float most = -INFINITY;
        for (int64_t t = from; t <= at; t++) {
            float score = dot(turned, keys + t * size, size) * d->scale;
            scores[t - from] = score;
            most = score > most ? score : most;
        }
        const int64_t count = at - from + 1;
        vec total = v_zero();
        for (int64_t t = 0; t < count; t += LANES) {
            vec e = v_first(exponential(v_sub(v_load_first(scores + t, count - t), v_set(most))), count - t);
            v_store_first(scores + t, count - t, e);
            total = v_add(total, e);
        }
        const vec factor = v_set(1.0f / v_sum(total));
        float *out = to + (row * d->heads + h) * size;
        for (int64_t k = 0; k < size; k += 4 * LANES) {
            vec sum[4];
            const int parts = (int)(size - k >= 4 * LANES ? 4 : (size - k) / LANES);
            for (int p = 0; p < 4; p++) sum[p] = v_zero();
            for (int64_t t = 0; t < count; t++)
                for (int p = 0; p < parts; p++) sum[p] = v_fma(v_set(scores[t]), v_load(values + (from + t) * size + k + p * LANES), sum[p]);
            for (int p = 0; p < parts; p++) v_store(out + k + p * LANES, v_mul(sum[p], factor));
        }
    }
}

static void add_rows(float *to, const float *from, int64_t rows, int64_t m, const struct team *team)
{
    struct range mine = share(rows, team);
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = mine.from; r < mine.to; r++) to[i * rows + r] += from[i * rows + r];
}

/* gate = silu(gate) * up, in the rows of this thread. */
static void gated(float *gate, const float *up, int64_t rows, int64_t m, const struct team *team)
{
    struct range mine = share(rows, team);
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = mine.from; r < mine.to; r += LANES) {
            const int64_t here = mine.to - r;
            vec x = v_load_first(gate + i * rows + r, here), y = v_load_first(up + i * rows + r, here);
            vec below = v_add(v_set(1.0f), exponential(v_sub(v_zero(), x)));
            v_store_first(gate + i * rows + r, here, v_mul(v_div(x, below), y));
        }
}

struct scratch { /* shared by all threads */
    float *hidden, *query, *key, *value, *attended, *projected, *gate, *up;
};

static void step(const struct decoder *d, const struct scratch *s, int64_t m, int64_t at, float *logits, const struct team *team,
                     float *normed, float *scores)
{
    for (int64_t n = 0; n < d->depth; n++) {
        const struct block *b = d->blocks + n;
        for (int64_t i = 0; i < m; i++) rms_norm(s->hidden + i * d->hidden, b->input_norm, d->hidden, d->epsilon, normed + i * d->hidden);
        apply(&b->query, normed, s->query, m, team);
        apply(&b->key, normed, s->key, m, team);
        apply(&b->value, normed, s->value, m, team);
#pragma omp barrier
        for (int64_t unit = team->number; unit < m * d->kv_heads; unit += team->size)
            attend(d, b, unit / d->kv_heads, unit % d->kv_heads, at, s->query, s->key, s->value, scores, s->attended);
#pragma omp barrier
        apply(&b->output, s->attended, s->projected, m, team);
        add_rows(s->hidden, s->projected, d->hidden, m, team);
#pragma omp barrier
        for (int64_t i = 0; i < m; i++) rms_norm(s->hidden + i * d->hidden, b->attention_norm, d->hidden, d->epsilon, normed + i * d->hidden);
        apply(&b->gate, normed, s->gate, m, team);
        apply(&b->up, normed, s->up, m, team);
        gated(s->gate, s->up, b->gate.rows, m, team);
#pragma omp barrier
        apply(&b->down, s->gate, s->projected, m, team);
        add_rows(s->hidden, s->projected, d->hidden, m, team);
#pragma omp barrier
    }
    for (int64_t i = 0; i < m; i++) rms_norm(s->hidden + i * d->hidden, d->final_norm, d->hidden, d->epsilon, normed + i * d->hidden);
    apply(&d->head, normed, logits, m, team);
}

/* Floats that each thread has for itself. */
struct room {
    int64_t normed, scores, sums, panels, scales, bytes;
};

static struct room room_of(const struct decoder *d, int64_t m)
{
    int64_t widest = d->heads * d->head_size;
    if (d->widest > widest) widest = d->widest;
    if (d->hidden > widest) widest = d->hidden;
    const int64_t steps = (widest + 63) / 64 * 16;
    return (struct room){m * d->hidden, d->capacity, m * (widest / 32), m * steps * (int64_t)(sizeof(quad) / 4), m, steps};
}

INLINE int64_t room_size(struct room r) { return r.normed + r.scores + r.sums + r.panels + r.scales + r.bytes; }

/* logits (m, vocabulary) of the tokens whose embeddings are hidden (m, hidden), at one position; hidden is used up.
 * room: optkit_decoder_room(...) floats. */
int optkit_decode(const struct decoder *d, float *hidden, int64_t m, int64_t at, float *logits, float *room, int32_t threads)
{
    if (at >= d->capacity)
        return OUT_OF_RANGE;
    const int64_t heads = d->heads * d->head_size, kv = d->kv_heads * d->head_size, widest = d->widest > d->hidden ? d->widest : d->hidden;
    struct scratch s = {.hidden = hidden};
    float *next = room;
    s.query = next, next += m * heads;
    s.key = next, next += m * kv;
    s.value = next, next += m * kv;
    s.attended = next, next += m * heads;
    s.projected = next, next += m * d->hidden;
    s.gate = next, next += m * widest;
    s.up = next, next += m * widest;
    const struct room r = room_of(d, m);
#pragma omp parallel num_threads(threads)
    {
        float *normed = next + omp_get_thread_num() * room_size(r), *scores = normed + r.normed;
        struct team team = {omp_get_thread_num(), omp_get_num_threads(), scores + r.scores, NULL, NULL, NULL};
        team.panels = team.sums + r.sums;
        team.scales = team.sums + r.sums + r.panels;
        team.bytes = (int8_t *)(team.scales + r.scales);
        step(d, &s, m, at, logits, &team, normed, scores);
    }
    return 0;
}

/* The floats of room that optkit_decode needs. */
int64_t optkit_decoder_room(const struct decoder *d, int64_t m, int32_t threads)
{
    const int64_t heads = d->heads * d->head_size, kv = d->kv_heads * d->head_size, widest = d->widest > d->hidden ? d->widest : d->hidden;
    return m * (2 * heads + 2 * kv + d->hidden + 2 * widest) + threads * room_size(room_of(d, m));
}
