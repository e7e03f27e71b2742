/* What the C files here call of each other, so that the compiler sees to it that they mean the same. */
#ifndef TRIMTAB_FUNCTIONS
#define TRIMTAB_FUNCTIONS

#include "vectors.h"

void trimtab_norm(void *x, const void *y, const void *weight, float eps, void *out, long ldo, const void *low, long rank, long n, long d,
                  int narrow, int threads);
void trimtab_beside(void *x, long ldx, const void *low, long rank, long n, long d, int narrow, int threads);
void trimtab_attend(const void *qkv, const float *scale, float eps, const float *cos, const float *sin, const int64_t *lengths, void *k,
                    void *v, long slot, long between, float factor, void *out, long ldo, const void *low, long rank, long n, long h,
                    long j, long e, int narrow, int threads);

#ifdef HAS_PRODUCTS

/* how W `[k, n]` lies */
enum { LAID_OUT, BY_COLUMN, BY_ROW }; /* in panels; as `[n, k]`, a layer's own weight; as `[k, n]` */

typedef struct {
    const uint16_t *x;
    int64_t ldx, k;
    const uint16_t *w;
    int64_t ldw, how;
} Part;

void trimtab_products(const Part *parts, long count, const uint16_t *bias, int gated, uint16_t *y, long ldy, long m, long n, int threads);

/* x W of `rows` rows of x `[rows, k]`, W `[k, n]` laid out, to y `[rows, n]`: by the thread that calls it */
void trimtab_rows_times(const uint16_t *x, long ldx, long rows, long k, const uint16_t *w, uint16_t *y, long ldy, long n);

#endif

#endif
