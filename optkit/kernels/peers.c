/* See peers.h. */
#define _GNU_SOURCE
#include "peers.h"

#include <sched.h>
#include <time.h>

#include "lanes.h"

enum { LINE = 64, SPINS = 2000 };

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

INLINE uint64_t *flag_of(const struct peers *p, int64_t rank) { return (uint64_t *)((char *)p->memory + rank * LINE); }

INLINE float *slot_of(const struct peers *p, int64_t rank)
{
    return (float *)((char *)p->memory + p->size * LINE) + (2 * rank + (int64_t)(p->turn & 1)) * p->capacity;
}

/* Spinning is for when everyone has a core; where there are more processes than cores, yielding lets the late ones run. */
static int wait_for(struct peers *p, int64_t rank, uint64_t turn, double start)
{
    for (int64_t spin = 1; __atomic_load_n(flag_of(p, rank), __ATOMIC_ACQUIRE) < turn; spin++) {
        _mm_pause();
        if (spin % SPINS)
            continue;
        sched_yield();
        if (now_s() - start > p->limit_s) {
            p->late = rank;
            return PEER_LATE;
        }
    }
    return 0;
}

static int sum_some(struct peers *p, float *x, int64_t n, double start)
{
    memcpy(slot_of(p, p->rank), x, (size_t)n * sizeof(float));
    const uint64_t turn = p->turn + 1;
    __atomic_store_n(flag_of(p, p->rank), turn, __ATOMIC_RELEASE);
    for (int64_t rank = 0; rank < p->size; rank++)
        if (wait_for(p, rank, turn, start))
            return PEER_LATE;
    for (int64_t k = 0; k < n; k += LANES) {
        vec sum = v_load_first(slot_of(p, 0) + k, n - k);
        for (int64_t rank = 1; rank < p->size; rank++) sum = v_add(sum, v_load_first(slot_of(p, rank) + k, n - k));
        v_store_first(x + k, n - k, sum);
    }
    p->turn = turn;
    return 0;
}

int optkit_sum(struct peers *p, float *x, int64_t n)
{
    const double start = now_s();
    for (int64_t done = 0; done < n; done += p->capacity)
        if (sum_some(p, x + done, n - done < p->capacity ? n - done : p->capacity, start))
            return PEER_LATE;
    p->waited_s += now_s() - start;
    return 0;
}
