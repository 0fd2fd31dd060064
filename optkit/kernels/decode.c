/* One step of a Llama-like decoder for a few sequences, from token ids to logits, in one parallel region.
 *
 * Threads share every product by output rows and wait for one another four times a block. Activations are float32.
 * Norms are computed by every thread for itself: that is cheaper than a wait.
 */
#include <omp.h>

#include "attention.h"

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
    void *panels; /* x in integers, for this thread alone, as the following */
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

/* Fetch what the first pass over a layer's rows reads before its own fetching ahead has begun. */
static void fetch_first(const struct dense *d, const struct team *team)
{
    if (!d->packed)
        return;
    const struct call c = call_of(d->packed, 1);
    const int64_t block = share(d->rows, team).from / LANES, bytes = c.block_bytes < AHEAD ? c.block_bytes : AHEAD;
    for (int64_t b = block; b < block + 4 && b < c.blocks; b++)
        for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch((const char *)d->packed->weight + b * c.block_bytes + at, _MM_HINT_T0);
}

static void multiply(const struct dense *d, const float *x, float *y, int64_t m, const struct team *team)
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
        c.fixed = fixed_in(d->packed, m, team->panels);
        for (int64_t i = 0; i < m; i++) fixed_row(d->packed, x, 0, i, &c.fixed);
    }
    few_blocks(&c, block, end);
}

/* y = x by the rows of d that are this thread's; next: the layer after it, or NULL. */
INLINE void apply(const struct dense *d, const float *x, float *y, int64_t m, const struct dense *next, const struct team *team)
{
    multiply(d, x, y, m, team);
    if (next) fetch_first(next, team);
}

static void add_rows(float *to, const float *from, int64_t rows, int64_t m, const struct team *team)
{
    struct range mine = share(rows, team);
    for (int64_t i = 0; i < m; i++)
        for (int64_t r = mine.from; r < mine.to; r++) to[i * rows + r] += from[i * rows + r];
}

/* y = the sum of everyone's y, where layers are shared with other processes: one thread does it, and all wait. */
static void sum_shares(const struct decoder *d, float *y, int64_t m, const struct team *team, int *status)
{
    if (!d->peers)
        return;
#pragma omp barrier
    if (team->number == 0 && !*status) *status = optkit_sum(d->peers, y, m * d->hidden);
#pragma omp barrier
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

/* The query heads of all sequences, shared evenly. */
static void attend_all(const struct decoder *d, const struct block *b, const struct scratch *s, int64_t m, int64_t at, const struct team *team,
                       const struct desk *desk)
{
    const int64_t group = d->heads / d->kv_heads, all = m * d->heads;
    int64_t head = all * team->number / team->size;
    const int64_t end = all * (team->number + 1) / team->size;
    while (head < end) {
        const int64_t row = head / d->heads, kv = head % d->heads / group;
        const int64_t last = row * d->heads + (kv + 1) * group < end ? row * d->heads + (kv + 1) * group : end;
        attend(d, b, row, kv, head - row * d->heads, last - row * d->heads, at, s->query, s->key, s->value, desk, s->attended);
        head = last;
    }
}

static void step(const struct decoder *d, const struct scratch *s, int64_t m, int64_t at, float *logits, const struct team *team,
                 float *normed, const struct desk *desk, int *status)
{
    uint64_t *ticks = team->number == 0 ? d->ticks : NULL, last = ticks ? __rdtsc() : 0;
    for (int64_t n = 0; n < d->depth; n++) {
        const struct block *b = d->blocks + n;
        for (int64_t i = 0; i < m; i++) rms_norm(s->hidden + i * d->hidden, b->input_norm, d->hidden, d->epsilon, normed + i * d->hidden);
        mark(ticks, &last, NORMS);
        apply(&b->query, normed, s->query, m, &b->key, team);
        apply(&b->key, normed, s->key, m, &b->value, team);
        apply(&b->value, normed, s->value, m, &b->output, team);
#pragma omp barrier
        mark(ticks, &last, PROJECTIONS);
        attend_all(d, b, s, m, at, team, desk);
#pragma omp barrier
        mark(ticks, &last, SCORES);
        apply(&b->output, s->attended, s->projected, m, &b->gate, team);
        mark(ticks, &last, PROJECTIONS);
        sum_shares(d, s->projected, m, team, status);
        mark(ticks, &last, COMMUNICATION);
        add_rows(s->hidden, s->projected, d->hidden, m, team);
#pragma omp barrier
        for (int64_t i = 0; i < m; i++) rms_norm(s->hidden + i * d->hidden, b->attention_norm, d->hidden, d->epsilon, normed + i * d->hidden);
        mark(ticks, &last, NORMS);
        apply(&b->gate, normed, s->gate, m, &b->up, team);
        apply(&b->up, normed, s->up, m, &b->down, team);
        gated(s->gate, s->up, b->gate.rows, m, team);
#pragma omp barrier
        apply(&b->down, s->gate, s->projected, m, n + 1 < d->depth ? &b[1].query : &d->head, team);
        mark(ticks, &last, FEED_FORWARD);
        sum_shares(d, s->projected, m, team, status);
        mark(ticks, &last, COMMUNICATION);
        add_rows(s->hidden, s->projected, d->hidden, m, team);
#pragma omp barrier
    }
    for (int64_t i = 0; i < m; i++) rms_norm(s->hidden + i * d->hidden, d->final_norm, d->hidden, d->epsilon, normed + i * d->hidden);
    mark(ticks, &last, NORMS);
    apply(&d->head, normed, logits, m, NULL, team);
    if (d->ticks) {
#pragma omp barrier
        mark(ticks, &last, HEAD);
    }
}

/* The time-stamp counter of the processor. */
uint64_t optkit_ticks(void) { return __rdtsc(); }

/* Floats that each thread has for itself. */
struct room {
    int64_t normed, queries, scores, panels, scales, bytes;
};

static struct room room_of(const struct decoder *d, int64_t m)
{
    int64_t widest = d->heads * d->head_size;
    if (d->widest > widest) widest = d->widest;
    if (d->hidden > widest) widest = d->hidden;
    const int64_t steps = (widest + 63) / 64 * 16, group = d->heads / d->kv_heads;
    return (struct room){m * d->hidden, group * d->head_size, group * d->capacity, m * steps * 4, m, steps};
}

INLINE int64_t room_size(struct room r) { return r.normed + r.queries + r.scores + r.panels + r.scales + r.bytes; }

/* logits (m, vocabulary) of the tokens whose embeddings are hidden (m, hidden), at one position; hidden is used up.
 * room: optkit_decoder_room(...) floats. */
int optkit_decode(const struct decoder *d, float *hidden, int64_t m, int64_t at, float *logits, float *room, int32_t threads)
{
    if (at >= d->positions || place_of(d, at) >= d->capacity)
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
    int status = 0;
#pragma omp parallel num_threads(threads)
    {
        float *normed = next + omp_get_thread_num() * room_size(r), *scores = normed + r.normed + r.queries;
        const struct desk desk = {normed + r.normed, scores};
        struct team team = {omp_get_thread_num(), omp_get_num_threads(), scores + r.scores, scores + r.scores + r.panels, NULL};
        team.bytes = (int8_t *)(team.scales + r.scales);
        step(d, &s, m, at, logits, &team, normed, &desk, &status);
    }
    return status;
}

/* The floats of room that optkit_decode needs. */
int64_t optkit_decoder_room(const struct decoder *d, int64_t m, int32_t threads)
{
    const int64_t heads = d->heads * d->head_size, kv = d->kv_heads * d->head_size, widest = d->widest > d->hidden ? d->widest : d->hidden;
    return m * (2 * heads + 2 * kv + d->hidden + 2 * widest) + threads * room_size(room_of(d, m));
}
