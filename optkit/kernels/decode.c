/* One step of a Llama-like decoder for a few sequences, from token ids to logits, in one parallel region.
 *
 * Threads share every product by output rows and wait for one another four times a block. Activations, keys and values are float32.
 * Norms are computed by every thread for itself: that is cheaper than a wait.
 */
#include <math.h>
#include <omp.h>

#include "few.h"

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

INLINE AVX __m512 exponential(__m512 x) /* Cephes expf: relative error below 2e-7 */
{
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.0f)), _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

INLINE AVX float dot(const float *a, const float *b, int64_t n)
{
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += LANES) sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + k), _mm512_loadu_ps(b + k), sum);
    return _mm512_reduce_add_ps(sum);
}

static AVX void rms_norm(const float *x, const float *weight, int64_t n, float epsilon, float *to)
{
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(dot(x, x, n) / (float)n + epsilon));
    for (int64_t k = 0; k < n; k += LANES)
        _mm512_storeu_ps(to + k, _mm512_mul_ps(_mm512_loadu_ps(weight + k), _mm512_mul_ps(_mm512_loadu_ps(x + k), factor)));
}

/* x turned by the angles of its position; cosine and sine repeat for both halves. */
static AVX void rotate(const float *x, const float *cosine, const float *sine, int64_t n, float *to)
{
    for (int64_t k = 0; k < n / 2; k++) {
        float low = x[k], high = x[k + n / 2];
        to[k] = low * cosine[k] - high * sine[k];
        to[k + n / 2] = high * cosine[k + n / 2] + low * sine[k + n / 2];
    }
}

static AVX void plain_rows(const struct dense *d, const float *x, float *y, int64_t m, int64_t from, int64_t to)
{
    const __mmask16 rest = first(d->cols % LANES ? d->cols % LANES : LANES);
    const int64_t last = (d->cols - 1) / LANES * LANES;
    for (int64_t r = from; r < to; r++)
        for (int64_t i = 0; i < m; i++) {
            __m512 a = _mm512_setzero_ps(), b = a;
            int64_t k = 0;
            for (; k + LANES <= last; k += 2 * LANES) {
                a = _mm512_fmadd_ps(load(d->weight, r * d->cols + k, (int)d->half, 0xffff), _mm512_loadu_ps(x + i * d->cols + k), a);
                b = _mm512_fmadd_ps(load(d->weight, r * d->cols + k + LANES, (int)d->half, k + LANES == last ? rest : 0xffff),
                                    _mm512_maskz_loadu_ps(k + LANES == last ? rest : 0xffff, x + i * d->cols + k + LANES), b);
            }
            if (k == last) a = _mm512_fmadd_ps(load(d->weight, r * d->cols + k, (int)d->half, rest), _mm512_maskz_loadu_ps(rest, x + i * d->cols + k), a);
            y[i * d->rows + r] = _mm512_reduce_add_ps(_mm512_add_ps(a, b)) + (d->bias ? d->bias[r] : 0.0f);
        }
}

struct team {
    int number, size;
    float *sums; /* (m, most groups) for this thread alone */
};

struct range {
    int64_t from, to;
};

/* The outputs that a thread computes: whole blocks of lanes, and so the same for packed and plain weights. */
INLINE struct range share(int64_t rows, const struct team *team)
{
    int64_t blocks = (rows + LANES - 1) / LANES;
    struct range found = {blocks * team->number / team->size * LANES, blocks * (team->number + 1) / team->size * LANES};
    if (found.to > rows) found.to = rows;
    return found;
}

static AVX void apply(const struct dense *d, const float *x, float *y, int64_t m, const struct team *team)
{
    struct range mine = share(d->rows, team);
    if (!d->packed) {
        plain_rows(d, x, y, m, mine.from, mine.to);
        return;
    }
    struct call c = call_of(d->packed, m);
    c.x = x, c.y = y, c.bias = d->bias;
    if (d->packed->group) {
        for (int64_t i = 0; i < m; i++) sum_groups(x + i * d->cols, c.groups, d->packed->group, team->sums + i * c.groups);
        c.sums = team->sums;
    }
    few_blocks(&c, mine.from / LANES, (mine.to + LANES - 1) / LANES);
}

/* Attention of all query heads that share one head of keys, for one sequence. */
static AVX void attend(const struct decoder *d, const struct block *b, int64_t row, int64_t kv, int64_t at, const float *query, const float *key,
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
        __m512 total = _mm512_setzero_ps();
        for (int64_t t = 0; t < count; t += LANES) {
            __mmask16 mask = first(count - t);
            __m512 e = _mm512_maskz_mov_ps(mask, exponential(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + t), _mm512_set1_ps(most))));
            _mm512_mask_storeu_ps(scores + t, mask, e);
            total = _mm512_add_ps(total, e);
        }
        const float factor = 1.0f / _mm512_reduce_add_ps(total);
        float *out = to + (row * d->heads + h) * size;
        for (int64_t k = 0; k < size; k += 4 * LANES) {
            __m512 sum[4];
            const int parts = (int)(size - k >= 4 * LANES ? 4 : (size - k) / LANES);
            for (int p = 0; p < 4; p++) sum[p] = _mm512_setzero_ps();
            for (int64_t t = 0; t < count; t++)
                for (int p = 0; p < parts; p++)
                    sum[p] = _mm512_fmadd_ps(_mm512_set1_ps(scores[t]), _mm512_loadu_ps(values + (from + t) * size + k + p * LANES), sum[p]);
            for (int p = 0; p < parts; p++) _mm512_storeu_ps(out + k + p * LANES, _mm512_mul_ps(sum[p], _mm512_set1_ps(factor)));
        }
    }
}

static AVX void add_rows(float *to, const float *from, int64_t rows, int64_t m, const struct team *team)
{
    struct range mine = share(rows, team);
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = mine.from; r < mine.to; r++) to[i * rows + r] += from[i * rows + r];
}

/* gate = silu(gate) * up, in the rows of this thread. */
static AVX void gated(float *gate, const float *up, int64_t rows, int64_t m, const struct team *team)
{
    struct range mine = share(rows, team);
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = mine.from; r < mine.to; r += LANES) {
            __mmask16 mask = first(mine.to - r);
            __m512 x = _mm512_maskz_loadu_ps(mask, gate + i * rows + r), y = _mm512_maskz_loadu_ps(mask, up + i * rows + r);
            __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
            _mm512_mask_storeu_ps(gate + i * rows + r, mask, _mm512_mul_ps(_mm512_div_ps(x, below), y));
        }
}

struct scratch { /* shared by all threads */
    float *hidden, *query, *key, *value, *attended, *projected, *gate, *up;
};

static AVX void step(const struct decoder *d, const struct scratch *s, int64_t m, int64_t at, float *logits, const struct team *team,
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
    const int64_t own = m * d->hidden + d->capacity + m * (widest > heads ? widest : heads) / 32;
#pragma omp parallel num_threads(threads)
    {
        float *mine = next + omp_get_thread_num() * own;
        struct team team = {omp_get_thread_num(), omp_get_num_threads(), mine + m * d->hidden + d->capacity};
        step(d, &s, m, at, logits, &team, mine, mine + m * d->hidden);
    }
    return 0;
}

/* The floats of room that optkit_decode needs. */
int64_t optkit_decoder_room(const struct decoder *d, int64_t m, int32_t threads)
{
    const int64_t heads = d->heads * d->head_size, kv = d->kv_heads * d->head_size, widest = d->widest > d->hidden ? d->widest : d->hidden;
    const int64_t own = m * d->hidden + d->capacity + m * (widest > heads ? widest : heads) / 32;
    return m * (2 * heads + 2 * kv + d->hidden + 2 * widest) + threads * own;
}
