/* Sums over processes of one host, through memory that they share. Everyone adds in the same order, so everyone gets the same bits.
 *
 * Each process has a flag, on a cache line of its own, and two slots in turn: a slot is written again two sums later, and by then the flags have
 * told that everyone has read it. */
#ifndef OPTKIT_PEERS_H
#define OPTKIT_PEERS_H
#include <stdint.h>

/* Shared with ctypes: keep the order of the fields. */
struct peers {
    int64_t rank, size, capacity; /* capacity: floats of a slot */
    uint64_t turn;                /* sums so far */
    void *memory;                 /* (size) flags of 64 bytes, then (size, 2, capacity) floats */
    double limit_s;               /* how long to wait for the others at most */
    double waited_s;              /* in all sums so far: the time of the sum, the wait for others included */
    int64_t late;                 /* who did not come */
};

/* x = the sum of everyone's x (n). Returns 0, or PEER_LATE after limit_s without the others. */
int optkit_sum(struct peers *p, float *x, int64_t n);

enum { PEER_LATE = -4 };

#endif
