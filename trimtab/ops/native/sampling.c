/* The next token of each row: the inverse of the cumulative distribution at one uniform number, and the log-probability it had. */
#include "vectors.h"

enum { STRETCH = 1024 }; /* numbers of a partial sum, a multiple of VEC */

INLINE void draw_row(const void *logits, float temperature, float u, int64_t *token, float *logp, long v, int narrow) {
    const long stretches = (v + STRETCH - 1) / STRETCH, whole = v / VEC * VEC;
    float *upto = scratch(0, stretches + STRETCH), *p = upto + stretches;
    vec tops = splat(-INFINITY);
    long i = 0;
    for (; i < whole; i += VEC) tops = greater(load_any(logits, i, narrow), tops);
    float top = greatest(tops);
    for (; i < v; i++) top = get(logits, i, narrow) > top ? get(logits, i, narrow) : top;
    /* what has been summed up to the end of each stretch: the same sums decide where the token lies */
    double total = 0;
    for (long s = 0; s < stretches; s++) {
        const long end = (s + 1) * STRETCH < v ? (s + 1) * STRETCH : v;
        vec sum = splat(0);
        for (i = s * STRETCH; i + VEC <= end; i += VEC) sum += exp_of((load_any(logits, i, narrow) - top) / temperature);
        total += sum_of(sum);
        for (; i < end; i++) total += exp_of(splat((get(logits, i, narrow) - top) / temperature))[0];
        upto[s] = (float)total;
    }
    const float target = u * upto[stretches - 1];
    long s = 0;
    while (s < stretches - 1 && !(upto[s] > target)) s++;
    const long start = s * STRETCH, end = start + STRETCH < v ? start + STRETCH : v;
    for (i = start; i + VEC <= end; i += VEC) store(p + i - start, exp_of((load_any(logits, i, narrow) - top) / temperature));
    for (; i < end; i++) p[i - start] = exp_of(splat((get(logits, i, narrow) - top) / temperature))[0];
    double sum = s ? upto[s - 1] : 0;
    long found = -1, likely = start;
    for (i = start; i < end && found < 0; i++) {
        sum += p[i - start];
        if (p[i - start] > p[likely - start]) likely = i;
        if ((float)sum > target) found = i;
    }
    /* rounding may leave the sum of a stretch just below what it was: then one of its tokens that can be drawn */
    *token = found < 0 ? likely : found;
    *logp = (get(logits, *token, narrow) - top) / temperature - logf(upto[stretches - 1]);
}

/* logits `[n, v]`, u `[n]` -> token and logp `[n]`. */
void trimtab_draw(const void *logits, float temperature, const float *u, int64_t *token, float *logp, long n, long v, int narrow,
                  int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < n; i++) {
        if (narrow)
            draw_row(at(logits, i * v, 1), temperature, u[i], token + i, logp + i, v, 1);
        else
            draw_row(at(logits, i * v, 0), temperature, u[i], token + i, logp + i, v, 0);
    }
}
