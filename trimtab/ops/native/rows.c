/* What lies between the products of a transformer layer, row by row: norms, the gated unit, rotation, a step's attention.
 *
 * Where `low` is given, a thin product follows: `low` is A^T of the adapters `[d, padded(rank)]` in float32, or for narrow x as products.c
 * has it laid out where that multiplies, and x A^T goes behind x, so that the next product finds [x | x A^T] lying ready.
 *
 * Shapes: n rows, d numbers of a row, h query heads, j key heads, e numbers a head.
 */
#include "functions.h"

INLINE void fetch(const void *from, long n, int narrow) {
    for (long i = 0; i < n; i += narrow ? 32 : 16) __builtin_prefetch(at(from, i, narrow), 0, 2);
}

#ifdef HAS_PRODUCTS
enum { STRIP = 2 * TALL }; /* rows at a time */
#else
enum { STRIP = TALL };
#endif

/* rows[:, d : d + rank] = x low, of STRIP rows at most: x in float32, and the same as it lies in `rows` */
static void side(const float *x, void *rows, long ld, long count, long d, const void *low, long rank, int narrow) {
#ifdef HAS_PRODUCTS
    if (narrow) {
        trimtab_rows_times(rows, ld, count, d, low, (uint16_t *)rows + d, ld, rank);
        return;
    }
#endif
    long width = padded(rank);
    float *found = scratch(7, STRIP * width);
    multiply(count, width / VEC, d, x, d, 1, low, VEC, width, found, width, 0);
    for (long i = 0; i < count; i++) narrow_down(at_mutable(rows, i * ld + d, narrow), found + i * width, rank, narrow);
}

static void beside_rows(void *x, long ldx, const void *low, long rank, long first, long last, long d, int narrow) {
    float *wide = scratch(0, STRIP * d);
#ifdef HAS_PRODUCTS
    if (!narrow)
#endif
        for (long i = first; i < last; i++) widen(wide + (i - first) * d, at(x, i * ldx, narrow), d, narrow);
    side(wide, at_mutable(x, first * ldx, narrow), ldx, last - first, d, low, rank, narrow);
}

/* x[:, d : d + rank] = x[:, :d] low */
void trimtab_beside(void *x, long ldx, const void *low, long rank, long n, long d, int narrow, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > STRIP)
    for (long first = 0; first < n; first += STRIP) beside_rows(x, ldx, low, rank, first, first + STRIP < n ? first + STRIP : n, d, narrow);
}

/* Columns [start, end) of low^T x, of low `[n, rank]` in float32 and x `[n, d]`, times `factor` to `[rank, d]` or `turned` to `[d, rank]`. */
static void thin_columns(const float *low, long rank, const void *x, long ldx, long n, long start, long end, float factor, float *out,
                         long d, int turned, int narrow) {
    enum { DEEP = 64 }; /* rows at a time, which a core's nearest cache holds; the next are fetched meanwhile */
    const long columns = end - start, whole = columns / VEC * VEC, width = padded(columns);
    float *found = scratch(1, rank * width);
    memset(found, 0, (size_t)(rank * width) * 4);
    for (long first = 0; first < n; first += DEEP) {
        const long deep = n - first < DEEP ? n - first : DEEP;
        const void *own = at(x, first * ldx + start, narrow);
        for (long i = first + DEEP; i < first + 2 * DEEP && i < n; i++) fetch(at(x, i * ldx + start, narrow), columns, narrow);
        if (narrow)
            multiply_narrow(rank, whole / VEC, deep, low + first * rank, 1, rank, own, VEC, ldx, found, width, 1);
        else
            multiply(rank, whole / VEC, deep, low + first * rank, 1, rank, own, VEC, ldx, found, width, 1);
        for (long i = 0; i < deep; i++)
            for (long c = whole; c < columns; c++)
                for (long r = 0; r < rank; r++) found[r * width + c] += low[(first + i) * rank + r] * get(own, i * ldx + c, narrow);
    }
    for (long c = 0; c < columns; c++)
        for (long r = 0; r < rank; r++) out[turned ? (start + c) * rank + r : r * d + start + c] = found[r * width + c] * factor;
}

/* The gradient of an adapter's matrix: low^T x times `factor` in float32, of low `[n, rank]` with rows `ldl` apart and x `[n, d]` with rows
 * `ldx` apart, to out `[rank, d]` or, `turned`, `[d, rank]`. `wide`: room for n rank numbers. */
void trimtab_thin(const void *low, long ldl, long rank, const void *x, long ldx, long n, long d, float factor, float *wide, float *out,
                  int turned, int narrow, int threads) {
    const long vectors = (d + VEC - 1) / VEC;
    for (long i = 0; i < n; i++) widen(wide + i * rank, at(low, i * ldl, narrow), rank, narrow);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < threads; t++) {
        const long start = vectors * t / threads * VEC, end = vectors * (t + 1) / threads * VEC;
        thin_columns(wide, rank, x, ldx, n, start, end < d ? end : d, factor, out, d, turned, narrow);
    }
}

INLINE float inverse_rms(const float *x, long d, float eps) {
    vec squares = splat(0);
    long i = 0;
    for (; i + VEC <= d; i += VEC) {
        vec part = load(x + i);
        squares += part * part;
    }
    float sum = sum_of(squares);
    for (; i < d; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / d + eps);
}

INLINE void norm_rows(void *x, const void *y, const void *weight, float eps, void *out, long ldo, const void *low, long rank, long first,
                      long last, long d, int narrow) {
    float *wide = scratch(0, STRIP * d);
    fetch(at(x, last * d, narrow), STRIP * d, narrow); /* another core may have written it */
    for (long i = first; i < last; i++) {
        float *own = wide + (i - first) * d;
        void *from = at_mutable(x, i * d, narrow);
        long c = 0;
        if (y) {
            const void *more = at(y, i * d, narrow);
            for (; c + VEC <= d; c += VEC) store_any(from, c, load_any(from, c, narrow) + load_any(more, c, narrow), narrow);
            for (; c < d; c++) put(from, c, get(from, c, narrow) + get(more, c, narrow), narrow);
        }
        widen(own, from, d, narrow);
        float r = inverse_rms(own, d, eps);
        void *to = at_mutable(out, i * ldo, narrow);
        for (c = 0; c + VEC <= d; c += VEC) {
            vec found = kept(kept(load(own + c) * r, narrow) * load_any(weight, c, narrow), narrow);
            store(own + c, found);
            store_any(to, c, found, narrow);
        }
        for (; c < d; c++) {
            put(to, c, kept_one(own[c] * r, narrow) * get(weight, c, narrow), narrow);
            own[c] = get(to, c, narrow);
        }
    }
    if (low) side(wide, at_mutable(out, first * ldo, narrow), ldo, last - first, d, low, rank, narrow);
}

/* x += y (unless y is null), and out = weight x / sqrt(mean(x^2) + eps), rounded before the weight as transformers does. */
void trimtab_norm(void *x, const void *y, const void *weight, float eps, void *out, long ldo, const void *low, long rank, long n, long d,
                  int narrow, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > STRIP)
    for (long t = 0; t < threads; t++)
        for (long first = n * t / threads, end = n * (t + 1) / threads; first < end; first += STRIP) {
            long last = first + STRIP < end ? first + STRIP : end;
            if (narrow)
                norm_rows(x, y, weight, eps, out, ldo, low, rank, first, last, d, 1);
            else
                norm_rows(x, y, weight, eps, out, ldo, low, rank, first, last, d, 0);
        }
}

/* The gradient of x: with p = grad weight, r (p - x r^2 mean(p x)). */
INLINE void norm_back_row(const void *x, const void *grad, const void *weight, float eps, void *out, long d, int narrow) {
    float *wide = scratch(0, 2 * d), *pull = wide + d;
    widen(wide, x, d, narrow);
    float r = inverse_rms(wide, d, eps), slope = 0;
    vec dots = splat(0);
    long c = 0;
    for (; c + VEC <= d; c += VEC) {
        vec own = load_any(grad, c, narrow) * load_any(weight, c, narrow);
        store(pull + c, own);
        dots += own * load(wide + c);
    }
    for (; c < d; c++) {
        pull[c] = get(grad, c, narrow) * get(weight, c, narrow);
        slope += pull[c] * wide[c];
    }
    slope = (slope + sum_of(dots)) * r * r / d;
    for (c = 0; c + VEC <= d; c += VEC) store_any(out, c, (load(pull + c) - load(wide + c) * slope) * r, narrow);
    for (; c < d; c++) put(out, c, (pull[c] - wide[c] * slope) * r, narrow);
}

void trimtab_norm_back(const void *x, const void *grad, const void *weight, float eps, void *out, long n, long d, int narrow,
                       int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < n; i++) {
        long own = i * d;
        if (narrow)
            norm_back_row(at(x, own, 1), at(grad, own, 1), weight, eps, at_mutable(out, own, 1), d, 1);
        else
            norm_back_row(at(x, own, 0), at(grad, own, 0), weight, eps, at_mutable(out, own, 0), d, 0);
    }
}

/* one number through the vector functions: what is left over at the end of a row */
INLINE float sigmoid_one(float x) { return sigmoid(splat(x))[0]; }

INLINE void gate_rows(const void *gate, const void *up, long ldi, void *out, long ldo, const void *low, long rank, long first, long last,
                      long d, int narrow) {
    float *wide = scratch(0, STRIP * d);
    for (long i = first; i < last; i++) {
        const void *g = at(gate, i * ldi, narrow), *u = at(up, i * ldi, narrow);
        void *to = at_mutable(out, i * ldo, narrow);
        float *own = wide + (i - first) * d;
        long c = 0;
        for (; c + VEC <= d; c += VEC) {
            vec x = load_any(g, c, narrow);
            vec found = kept(kept(x * sigmoid(x), narrow) * load_any(u, c, narrow), narrow);
            store(own + c, found);
            store_any(to, c, found, narrow);
        }
        for (; c < d; c++) {
            float x = get(g, c, narrow);
            put(to, c, kept_one(x * sigmoid_one(x), narrow) * get(u, c, narrow), narrow);
            own[c] = get(to, c, narrow);
        }
    }
    if (low) side(wide, at_mutable(out, first * ldo, narrow), ldo, last - first, d, low, rank, narrow);
}

/* out = silu(gate) up; rows of gate and up `ldi` apart. */
void trimtab_gate(const void *gate, const void *up, long ldi, void *out, long ldo, const void *low, long rank, long n, long d, int narrow,
                  int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > STRIP)
    for (long t = 0; t < threads; t++)
        for (long first = n * t / threads, end = n * (t + 1) / threads; first < end; first += STRIP) {
            long last = first + STRIP < end ? first + STRIP : end;
            if (narrow)
                gate_rows(gate, up, ldi, out, ldo, low, rank, first, last, d, 1);
            else
                gate_rows(gate, up, ldi, out, ldo, low, rank, first, last, d, 0);
        }
}

/* grad is that of act = silu(gate) up: it becomes that of gate, `up_grad` that of up, and act is there again in `act`. */
void trimtab_gate_back(const void *gate, const void *up, void *grad, void *up_grad, void *act, long count, int narrow, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count / VEC; i++) {
        long c = i * VEC;
        vec x = load_any(gate, c, narrow), s = sigmoid(x), u = load_any(up, c, narrow), pull = load_any(grad, c, narrow);
        vec silu = kept(x * s, narrow);
        store_any(act, c, silu * u, narrow);
        store_any(up_grad, c, silu * pull, narrow);
        store_any(grad, c, kept(pull * u, narrow) * s * (1.0f + x * (1.0f - s)), narrow);
    }
    for (long c = count / VEC * VEC; c < count; c++) {
        float x = get(gate, c, narrow), s = sigmoid_one(x), u = get(up, c, narrow), pull = get(grad, c, narrow);
        float silu = kept_one(x * s, narrow);
        put(act, c, silu * u, narrow);
        put(up_grad, c, silu * pull, narrow);
        put(grad, c, kept_one(pull * u, narrow) * s * (1.0f + x * (1.0f - s)), narrow);
    }
}

/* One head turned to its position (arXiv:2104.09864): halves (a, b) become (a cos - b sin, b cos + a sin). `scale`: of a norm first, or
 * null. */
INLINE void turn_head(float *x, const float *scale, float eps, const float *cos, const float *sin, long e, int narrow) {
    if (scale) {
        float r = inverse_rms(x, e, eps);
#pragma omp simd
        for (long i = 0; i < e; i++) x[i] = kept_one(x[i] * r, narrow) * scale[i];
    }
#pragma omp simd
    for (long i = 0; i < e / 2; i++) {
        float a = x[i], b = x[i + e / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + e / 2] = b * cos[i] + a * sin[i];
    }
}

/* Queries and keys of qkv `[n, (h + 2 j) e]` turned in place; cos and sin `[positions, e / 2]`; scale `[h + j, e]` or null. Without
 * `positions` row i is at i. */
void trimtab_turn(void *qkv, const float *scale, float eps, const float *cos, const float *sin, const int64_t *positions, long n, long h,
                  long j, long e, int narrow, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < n; i++) {
        float *x = scratch(0, e);
        const long place = (positions ? positions[i] : i) * (e / 2);
        for (long head = 0; head < h + j; head++) {
            void *own = at_mutable(qkv, (i * (h + 2 * j) + head) * e, narrow);
            widen(x, own, e, narrow);
            turn_head(x, scale ? scale + head * e : NULL, eps, cos + place, sin + place, e, narrow);
            narrow_down(own, x, e, narrow);
        }
    }
}

/* scores[c] = x . key c, of `columns` keys one after the other, e a multiple of VEC; scores has room up to a multiple of VEC. */
INLINE void score(const float *x, const void *keys, long columns, long e, float *scores, int narrow) {
    for (long c = 0; c < columns; c += VEC) {
        vec dots[VEC];
#pragma GCC unroll 16
        for (int i = 0; i < VEC; i++) {
            const void *key = at(keys, (c + i < columns ? c + i : columns - 1) * e, narrow);
            vec dot = splat(0);
            for (long s = 0; s < e; s += VEC) dot += load(x + s) * load_any(key, s, narrow);
            dots[i] = dot;
        }
        store(scores + c, sums_of(dots));
    }
}

#ifdef __AVX512BF16__
/* the same of keys and x in bfloat16, e a multiple of 2 VEC */
INLINE void score_narrow(const uint16_t *x, const uint16_t *keys, long columns, long e, float *scores) {
    for (long c = 0; c < columns; c += VEC) {
        vec dots[VEC];
#pragma GCC unroll 16
        for (int i = 0; i < VEC; i++) dots[i] = splat(0);
        for (long s = 0; s < e; s += 2 * VEC) {
            __m512bh own = (__m512bh)_mm512_loadu_si512(x + s);
#pragma GCC unroll 16
            for (int i = 0; i < VEC; i++) {
                const uint16_t *key = keys + (c + i < columns ? c + i : columns - 1) * e + s;
                dots[i] = (vec)_mm512_dpbf16_ps((__m512)dots[i], own, (__m512bh)_mm512_loadu_si512(key));
            }
        }
        store(scores + c, sums_of(dots));
    }
}
#endif

/* Key head `head` of one row: its key and value go to column `length` of the cache, its g query heads look at all columns up to that.
 * Queries are rounded as keys are, as those of the scorer's forward pass. Meanwhile what is read next is fetched, a part for each of them:
 * all at once would hold up what is computed here. */
INLINE void attend(const void *row, long head, const float *scale, float eps, const float *cos, const float *sin, long length, void *k,
                   void *v, const void *next_k, const void *next_v, float factor, void *out, long h, long j, long e, int narrow) {
    const long g = h / j, columns = length + 1, room = padded(columns);
    float *x = scratch(0, 2 * e), *sums = scratch(2, g * e), *scores = scratch(1, g * room);
    void *rounded_x = x + e;
    cos += length * (e / 2), sin += length * (e / 2);
    widen(x, at(row, (h + head) * e, narrow), e, narrow);
    turn_head(x, scale ? scale + (h + head) * e : NULL, eps, cos, sin, e, narrow);
    narrow_down(at_mutable(k, length * e, narrow), x, e, narrow);
    memcpy(at_mutable(v, length * e, narrow), at(row, (h + j + head) * e, narrow), (size_t)(e * (narrow ? 2 : 4)));
    const long part = columns / g * e;
    for (long q = 0; q < g; q++) {
        float *own = scores + q * room;
        widen(x, at(row, (head * g + q) * e, narrow), e, narrow);
        turn_head(x, scale ? scale + (head * g + q) * e : NULL, eps, cos, sin, e, narrow);
        narrow_down(rounded_x, x, e, narrow);
        fetch(at(next_k, q * part, narrow), part, narrow);
#ifdef __AVX512BF16__
        if (narrow && e % (2 * VEC) == 0)
            score_narrow(rounded_x, k, columns, e, own);
        else
#endif
        {
            widen(x, rounded_x, e, narrow);
            score(x, k, columns, e, own, narrow);
        }
        fetch(at(next_v, q * part, narrow), part, narrow);
        vec tops = splat(-INFINITY), sum = splat(0);
        for (long c = columns; c < room; c++) own[c] = -INFINITY;
        for (long c = 0; c < room; c += VEC) tops = greater(load(own + c), tops);
        float top = greatest(tops);
        for (long c = 0; c < room; c += VEC) {
            vec p = exp_of((load(own + c) - top) * factor);
            store(own + c, p);
            sum += p;
        }
        float share = 1 / sum_of(sum);
        for (long c = 0; c < room; c += VEC) store(own + c, load(own + c) * share);
    }
    if (narrow)
        multiply_narrow(g, e / VEC, columns, scores, room, 1, v, VEC, e, sums, e, 0);
    else
        multiply(g, e / VEC, columns, scores, room, 1, v, VEC, e, sums, e, 0);
    narrow_down(at_mutable(out, head * g * e, narrow), sums, g * e, narrow);
}

/* A step's attention, e a multiple of VEC: row i of qkv `[n, (h + 2 j) e]` goes on from `lengths[i]` tokens in slot i of the caches,
 * whose slots are `slot` numbers apart and whose key heads are `between`. */
void trimtab_attend(const void *qkv, const float *scale, float eps, const float *cos, const float *sin, const int64_t *lengths, void *k,
                    void *v, long slot, long between, float factor, void *out, long ldo, const void *low, long rank, long n, long h,
                    long j, long e, int narrow, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long task = 0; task < n * j; task++) {
            long i = task / j, head = task % j, place = i * slot + head * between;
            const void *row = at(qkv, i * (h + 2 * j) * e, narrow);
            void *own_k = at_mutable(k, place, narrow), *own_v = at_mutable(v, place, narrow), *to = at_mutable(out, i * ldo, narrow);
            const long next = (task + 1) / j * slot + (task + 1) % j * between;
            const void *next_k = at(k, next, narrow), *next_v = at(v, next, narrow);
            if (narrow)
                attend(row, head, scale, eps, cos, sin, lengths[i], own_k, own_v, next_k, next_v, factor, to, h, j, e, 1);
            else
                attend(row, head, scale, eps, cos, sin, lengths[i], own_k, own_v, next_k, next_v, factor, to, h, j, e, 0);
        }
        if (low) {
#pragma omp for schedule(static)
            for (long first = 0; first < n; first += STRIP)
                beside_rows(out, ldo, low, rank, first, first + STRIP < n ? first + STRIP : n, h * e, narrow);
        }
    }
}

/* Token `read[i]` of qkv `[., (h + 2 j) e]`: its key and value to slot `slots[i]`, column `columns[i]` of the caches. */
void trimtab_keep(const void *qkv, const int64_t *read, const int64_t *slots, const int64_t *columns, void *k, void *v, long slot,
                  long between, long n, long h, long j, long e, int narrow, int threads) {
    const size_t size = (size_t)(e * (narrow ? 2 : 4));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < n; i++)
        for (long head = 0; head < j; head++) {
            const long from = (read[i] * (h + 2 * j) + h + head) * e, to = slots[i] * slot + head * between + columns[i] * e;
            memcpy(at_mutable(k, to, narrow), at(qkv, from, narrow), size);
            memcpy(at_mutable(v, to, narrow), at(qkv, from + j * e, narrow), size);
        }
}
