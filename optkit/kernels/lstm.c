/* Passes of an LSTM through time: for each step the product of the hidden state with its packed weight, and the gates. One thread a pass.
 *
 * An LSTM in both directions has two passes, which need nothing of one another.
 */
#include "call.h"
#include "decoder.h"

enum { GATES = 4 };

/* Shared with ctypes: keep the order of the fields. */
struct pass {
    const struct layer *hidden; /* (4 hidden, hidden) */
    const float *bias;          /* (4 hidden) or NULL */
    const float *given;         /* (steps, batch, 4 hidden): the products of the input */
    float *visible, *held;      /* (batch, hidden): h and c, before and after */
    float *y;                   /* (steps, batch, apart): h of each step stands from here on */
    int64_t apart, backwards;
};

int optkit_linear(const struct layer *layer, const void *x, const void *bias, void *y, int64_t m, int32_t halves, int32_t threads);

INLINE vec sigmoid(vec x) { return v_div(v_set(1), v_add(v_set(1), exponential(v_sub(v_zero(), x)))); }
INLINE vec tangent(vec x) { return v_sub(v_set(1), v_div(v_set(2), v_add(v_set(1), exponential(v_add(x, x))))); }

/* Near zero the difference above would lose all its digits: there tanh x = x - x^3 / 3 + 2 x^5 / 15. */
INLINE vec tanh_of(vec x)
{
    const vec square = v_mul(x, x), small = v_mul(x, v_fma(square, v_fma(square, v_set(2.0f / 15), v_set(-1.0f / 3)), v_set(1)));
    const vec near = v_min(v_set(1), v_max(v_zero(), v_mul(v_sub(v_set(0.0625f), v_abs(x)), v_set(1e9f)))); /* 1 below a sixteenth, else 0 */
    return v_fma(near, v_sub(small, tangent(x)), tangent(x));
}

static void gates(const float *given, const float *product, int64_t hidden, float *visible, float *held, float *y)
{
    for (int64_t k = 0; k < hidden; k += LANES) {
        const int64_t here = hidden - k;
        vec sums[GATES];
        UNROLL for (int gate = 0; gate < GATES; gate++)
            sums[gate] = v_add(v_load_first(given + gate * hidden + k, here), v_load_first(product + gate * hidden + k, here));
        const vec kept = v_mul(sigmoid(sums[1]), v_load_first(held + k, here));
        const vec cell = v_fma(sigmoid(sums[0]), tanh_of(sums[2]), kept), out = v_mul(sigmoid(sums[3]), tanh_of(cell));
        v_store_first(held + k, here, cell);
        v_store_first(visible + k, here, out);
        v_store_first(y + k, here, out);
    }
}

static int go(const struct pass *p, int64_t steps, int64_t batch, float *product)
{
    const int64_t hidden = p->hidden->cols;
    for (int64_t step = 0; step < steps; step++) {
        const int64_t at = p->backwards ? steps - 1 - step : step;
        const int status = optkit_linear(p->hidden, p->visible, p->bias, product, batch, 0, 1);
        if (status)
            return status;
        for (int64_t b = 0; b < batch; b++)
            gates(p->given + (at * batch + b) * GATES * hidden, product + b * GATES * hidden, hidden, p->visible + b * hidden, p->held + b * hidden,
                  p->y + (at * batch + b) * p->apart);
    }
    return 0;
}

int optkit_lstm(const struct pass *passes, int64_t count, int64_t steps, int64_t batch, int32_t threads)
{
    int status = 0;
#pragma omp parallel for num_threads(threads < count ? threads : (int)count) reduction(min : status) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++) {
        float *product = malloc((size_t)(batch * GATES * passes[i].hidden->cols) * sizeof(float));
        status = product ? go(passes + i, steps, batch, product) : NO_MEMORY;
        free(product);
    }
    return status;
}
