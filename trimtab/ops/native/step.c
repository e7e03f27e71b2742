/* A whole step of decoding, layer by layer, where products.c multiplies: what `engine/blocks.py` does with one call of each function here
 * and a few hundred of them a step, which takes Python as long as a tenth of a small step.
 */
#include "functions.h"

#ifdef HAS_PRODUCTS

/* a product `[n, k]` laid out, as `Product` and `Gated` have it, and the adapters whose numbers lie behind its input: k counts them */
typedef struct {
    const uint16_t *w, *bias;
    int64_t n, k;
    const void *low;
    int64_t rank;
} Linear;

typedef struct {
    Linear qkv, o, gate_up, down;
    const uint16_t *norm_after, *norm_next;
    const float *scale;
    uint16_t *k, *v; /* the caches */
} Layer;

static void times(const uint16_t *x, const Linear *linear, int gated, uint16_t *y, long ldy, long m, int threads) {
    const Part part = {x, linear->k, linear->k, linear->w, 0, LAID_OUT};
    trimtab_products(&part, 1, linear->bias, gated, y, ldy, m, linear->n, threads);
}

/* x `[n, d]` through all layers, in place, after the first of them has been given its norm; `normed` `[n, d]` is what the last norm made of
 * it. Room for n rows each: in `normed` d numbers and the adapters that read a norm, in y d, in `seen` what attention saw, in `wide` qkv or
 * what passes the gates, both with the adapters that read them. */
void trimtab_step(const Layer *layers, long count, const uint16_t *norm, uint16_t *x, uint16_t *normed, uint16_t *y, uint16_t *seen,
                  uint16_t *wide, float eps, const float *cos, const float *sin, const int64_t *lengths, long slot, long between,
                  float factor, long n, long d, long h, long j, long e, int threads) {
    trimtab_norm(x, NULL, norm, eps, normed, layers->qkv.k, layers->qkv.low, layers->qkv.rank, n, d, 1, threads);
    for (long i = 0; i < count; i++) {
        const Layer *own = layers + i;
        const Linear *o = &own->o, *gates = &own->gate_up, *down = &own->down, *next = i + 1 < count ? &layers[i + 1].qkv : NULL;
        times(normed, &own->qkv, 0, wide, own->qkv.n, n, threads);
        trimtab_attend(wide, own->scale, eps, cos, sin, lengths, own->k, own->v, slot, between, factor, seen, o->k, o->low, o->rank, n, h,
                       j, e, 1, threads);
        times(seen, o, 0, y, d, n, threads);
        trimtab_norm(x, y, own->norm_after, eps, normed, gates->k, gates->low, gates->rank, n, d, 1, threads);
        times(normed, gates, 1, wide, down->k, n, threads);
        if (down->low) trimtab_beside(wide, down->k, down->low, down->rank, n, down->k - down->rank, 1, threads);
        times(wide, down, 0, y, d, n, threads);
        trimtab_norm(x, y, own->norm_next, eps, normed, next ? next->k : d, next ? next->low : NULL, next ? next->rank : 0, n, d, 1,
                     threads);
    }
}

#endif
