/* One tile of the vocabulary in a softmax that never has all of it (arXiv:2205.14135, section 3.1), for `ops/logprobs.py`, where the sums
 * are said and the tiles are gone through.
 *
 * All sums are relative to the greatest logit so far and shrink when it grows; the target's own term stays out of them.
 */
#include "vectors.h"

typedef struct {
    float *top, *others, *sloped, *target, *shrink; /* `[n]` each; `target`: the logit itself, once its tile has been met */
} Sums;

INLINE void tile_row(void *z, long i, long place, float temperature, const Sums *sums, long v, int narrow) {
    const int here = place >= 0 && place < v;
    vec tops = splat(-INFINITY);
    long c = 0;
    for (; c + VEC <= v; c += VEC) tops = greater(load_any(z, c, narrow), tops);
    float top = greatest(tops);
    for (; c < v; c++) top = get(z, c, narrow) > top ? get(z, c, narrow) : top;
    top /= temperature;
    if (here) {
        sums->target[i] = get(z, place, narrow) / temperature;
        put(z, place, (top - 1000) * temperature, narrow); /* e to the power of it is 0, and its slope no nan */
    }
    const float before = sums->top[i], higher = before > top ? before : top;
    const float shift = before == -INFINITY ? 0 : before - higher, shrink = expf(shift); /* the first tile has nothing to shrink */
    vec total = splat(0), slope = splat(0);
    for (c = 0; c + VEC <= v; c += VEC) {
        vec x = load_any(z, c, narrow) / temperature - higher, e = exp_of(x);
        total += e;
        slope += e * x;
        store_any(z, c, e, narrow);
    }
    float rest = 0, tilted = 0;
    for (; c < v; c++) {
        float x = get(z, c, narrow) / temperature - higher, e = exp_of(splat(x))[0];
        rest += e;
        tilted += e * x;
        put(z, c, e, narrow);
    }
    sums->sloped[i] = shrink * (sums->sloped[i] + shift * sums->others[i]) + sum_of(slope) + tilted;
    sums->others[i] = shrink * sums->others[i] + sum_of(total) + rest;
    sums->top[i] = higher;
    sums->shrink[i] = shrink;
}

/* Logits z `[n, v]` before the temperature, of which `places[i]` is the target's column (or lies outside), to e^(z - top), 0 at the target;
 * the sums `[5, n]` are brought up to it. */
void trimtab_tile(void *z, const int64_t *places, float temperature, float *sums, long n, long v, int narrow, int threads) {
    const Sums own = {sums, sums + n, sums + 2 * n, sums + 3 * n, sums + 4 * n};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < n; i++) {
        if (narrow)
            tile_row(at_mutable(z, i * v, 1), i, places[i], temperature, &own, v, 1);
        else
            tile_row(at_mutable(z, i * v, 0), i, places[i], temperature, &own, v, 0);
    }
}
