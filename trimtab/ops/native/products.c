/* Products in bfloat16 for CPUs with AVX512-BF16 and without matrix units (AMX): y = x_1 W_1 + x_2 W_2 + ... + bias.
 *
 * A layer and its adapters are one such sum, and so is the gradient of what several layers read: one pass over y, all sums in float32.
 *
 * The inner loop multiplies two numbers of each of ROWS rows of x with two numbers of each of PANEL columns of W. So a panel of W lies as
 * `[k / 2, PANEL, 2]`: once and for all for the products of few rows that decoding makes, else made from W as it is when it is needed, which
 * costs little beside a few hundred rows.
 */
#include "functions.h"

#ifdef HAS_PRODUCTS

enum { ROWS = 12, PANEL = 2 * VEC, CACHED = 1 << 18 };

int trimtab_has_products(void) { return 1; }

INLINE long panels_of(long n) { return (n + PANEL - 1) / PANEL; }

/* numbers of a panel */
INLINE long size_of(long k) { return (k + 1) / 2 * 2 * PANEL; }

static void panel_by_column(const uint16_t *w, long ldw, long columns, long k, uint16_t *to) {
    for (long c = 0; c < PANEL; c += VEC) {
        long s = 0;
        for (; s + 2 * VEC <= k; s += 2 * VEC) {
            vec rows[VEC]; /* of pairs, which move as one number */
            for (long i = 0; i < VEC; i++) rows[i] = c + i < columns ? load((const float *)(w + (c + i) * ldw + s)) : splat(0);
            transpose(rows);
            for (long i = 0; i < VEC; i++) store((float *)(to + (s / 2 + i) * PANEL * 2 + c * 2), rows[i]);
        }
        for (; s < k + k % 2; s++)
            for (long i = 0; i < VEC; i++)
                to[s / 2 * PANEL * 2 + (c + i) * 2 + s % 2] = s < k && c + i < columns ? w[(c + i) * ldw + s] : 0;
    }
}

static void panel_by_row(const uint16_t *w, long ldw, long columns, long k, uint16_t *to) {
    static const uint16_t zeros[PANEL];
    uint16_t part[2][PANEL] = {{0}};
    for (long s = 0; s < k; s += 2, to += 2 * PANEL) {
        const uint16_t *even = w + s * ldw, *odd = s + 1 < k ? even + ldw : zeros;
        if (columns < PANEL) {
            memcpy(part[0], even, (size_t)columns * 2), memcpy(part[1], odd, (size_t)columns * 2);
            even = part[0], odd = part[1];
        }
#pragma GCC unroll 1
        for (long c = 0; c < PANEL; c++) to[2 * c] = even[c], to[2 * c + 1] = odd[c];
    }
}

/* numbers of W `[n, k]` laid out */
long trimtab_laid_out(long n, long k) { return panels_of(n) * size_of(k); }

void trimtab_lay_out(const uint16_t *w, long n, long k, uint16_t *to, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long panel = 0; panel < panels_of(n); panel++) {
        long columns = n - panel * PANEL < PANEL ? n - panel * PANEL : PANEL;
        panel_by_column(w + panel * PANEL * k, k, columns, k, to + panel * size_of(k));
    }
}

/* what will be needed soon: lines of memory, `step` numbers apart, as many as a tile has steps */
typedef struct {
    const uint16_t *from;
    long step;
} Fetch;

/* sums += two numbers (`bytes`: 4) or one (2) of each row with two of each column */
INLINE void step(const int rows, const int vectors, vec (*sums)[2], const char *const *x, long apart, const uint16_t *w, const int bytes) {
    __m512bh right[2];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; j++) right[j] = (__m512bh)_mm512_loadu_si512(w + j * VEC * 2);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        int32_t pair = 0;
        memcpy(&pair, x[i / 3] + i % 3 * apart, bytes);
        __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sums[i][j] = (vec)_mm512_dpbf16_ps((__m512)sums[i][j], right[j], left);
    }
}

/* The sums of `rows` rows at one panel, to `found` `[rows, PANEL]`; meanwhile half a panel's worth of lines is fetched.
 *
 * The rows of x are reached from every third one. With a pointer for each, which is what the compiler makes of it when it sees through
 * this, they do not fit the registers, and the loop is a seventh slower. */
INLINE void panel_tile(const int rows, const int vectors, const Part *parts, long count, const uint16_t *const *panels, long first,
                       float *found, Fetch fetch) {
    enum { THIRDS = (ROWS + 2) / 3 };
    vec sums[ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sums[i][j] = splat(0);
    for (long p = 0; p < count; p++) {
        const long apart = 2 * parts[p].ldx, k = parts[p].k;
        const uint16_t *w = panels[p];
        const char *x[THIRDS];
        for (int i = 0; i < THIRDS; i++) x[i] = (const char *)parts[p].x + (first + (3 * i < rows ? 3 * i : 0)) * apart;
        for (long s = 0; s < k / 2; s++) {
            asm("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3]), "+r"(w), "+r"(fetch.from));
            if (!p) __builtin_prefetch(fetch.from, 0, 2);
            step(rows, vectors, sums, x, apart, w, 4);
            for (int i = 0; i < THIRDS; i++) x[i] += 4;
            w += 2 * PANEL, fetch.from += fetch.step;
        }
        if (k % 2) step(rows, vectors, sums, x, apart, w, 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) store(found + i * PANEL + j * VEC, sums[i][j]);
}

/* sums of a tile to y */
static void finish(long rows, long columns, const float *found, const uint16_t *bias, uint16_t *y, long ldy) {
    for (long i = 0; i < rows; i++, found += PANEL, y += ldy) {
        long c = 0;
        for (; c + VEC <= columns; c += VEC) {
            vec sum = load(found + c);
            if (bias) sum += load_any(bias, c, 1);
            store_any(y, c, sum, 1);
        }
        for (; c < columns; c++) y[c] = rounded(found[c] + (bias ? widened(bias[c]) : 0));
    }
}

/* silu(gate) up of a tile whose first vector is a gate and whose second is what passes it, each rounded before as a layer's output is */
static void finish_gated(long rows, const float *found, uint16_t *y, long ldy) {
    for (long i = 0; i < rows; i++, found += PANEL, y += ldy) {
        vec gate = kept(load(found), 1), up = kept(load(found + VEC), 1);
        store_any(y, 0, kept(gate * sigmoid(gate), 1) * up, 1);
    }
}

enum { PARTS = 8 };

typedef struct {
    const Part *parts;
    long count;
    const uint16_t *bias;
    int gated;
    uint16_t *y;
    long ldy, m, n;
} Sum;

/* ROWS rows from row i on at one panel, of whose parts `panels` are the numbers. */
static void one_tile(const Sum *sum, const uint16_t *const *panels, long panel, long i, long to, Fetch fetch) {
    float found[ROWS * PANEL];
    const Part *parts = sum->parts;
    const long count = sum->count, columns = sum->n - panel * PANEL < PANEL ? sum->n - panel * PANEL : PANEL;
    const long tall = to - i < ROWS ? to - i : ROWS;
#define TILE(M)                                                                                                                        \
    case M:                                                                                                                            \
        if (columns <= VEC)                                                                                                            \
            panel_tile(M, 1, parts, count, panels, i, found, fetch);                                                                   \
        else                                                                                                                           \
            panel_tile(M, 2, parts, count, panels, i, found, fetch);                                                                   \
        break;
    switch (tall) { TILE(12) TILE(11) TILE(10) TILE(9) TILE(8) TILE(7) TILE(6) TILE(5) TILE(4) TILE(3) TILE(2) TILE(1) }
#undef TILE
    if (sum->gated) {
        finish_gated(tall, found, sum->y + i * sum->ldy + panel * VEC, sum->ldy);
        return;
    }
    finish(tall, columns, found, sum->bias ? sum->bias + panel * PANEL : NULL, sum->y + i * sum->ldy + panel * PANEL, sum->ldy);
}

/* The first (0) or second (1) half of what a panel is made from, of a part that is not laid out. */
INLINE Fetch half_of(const Part *part, long panel, long second) {
    const long half = part->k / 2 * second;
    if (part->how == BY_ROW) return (Fetch){part->w + panel * PANEL + half * part->ldw, part->ldw};
    return (Fetch){part->w + panel * PANEL * part->ldw + half * 2 * VEC, 2 * VEC};
}

/* Rows [from, to) of y at the panels [start, end). Where all parts are laid out, the panels pass by some rows that stay in a core's cache;
 * else a panel is made, which stays there, and the rows pass by: making several at a time would wait for memory longer. */
static void area(const Sum *sum, long from, long to, long start, long end) {
    const Part *parts = sum->parts;
    const uint16_t *panels[PARTS];
    long width = 0, size = 0;
    for (long p = 0; p < sum->count; p++) {
        width += parts[p].k;
        if (parts[p].how != LAID_OUT) size += size_of(parts[p].k);
    }
    if (!size) {
        long rows = CACHED / (2 * width) / ROWS * ROWS;
        rows = rows > ROWS ? rows : ROWS;
        for (long first = from; first < to; first += rows)
            for (long panel = start; panel < end; panel++) {
                for (long p = 0; p < sum->count; p++) panels[p] = parts[p].w + panel * size_of(parts[p].k);
                const long whole = size_of(parts[0].k);
                for (long i = first; i < first + rows && i < to; i += ROWS)
                    one_tile(sum, panels, panel, i, to < first + rows ? to : first + rows,
                             (Fetch){panels[0] + whole + (i > first ? whole / 2 : 0), 2 * VEC});
            }
        return;
    }
    uint16_t *made = (uint16_t *)scratch(3, (size + 1) / 2);
    for (long panel = start; panel < end; panel++) {
        uint16_t *room = made;
        const long columns = sum->n - panel * PANEL < PANEL ? sum->n - panel * PANEL : PANEL;
        for (long p = 0; p < sum->count; p++) {
            const Part *own = parts + p;
            panels[p] = own->how == LAID_OUT ? own->w + panel * size_of(own->k) : room;
            if (own->how == BY_COLUMN) panel_by_column(own->w + panel * PANEL * own->ldw, own->ldw, columns, own->k, room);
            if (own->how == BY_ROW) panel_by_row(own->w + panel * PANEL, own->ldw, columns, own->k, room);
            if (own->how != LAID_OUT) room += size_of(own->k);
        }
        for (long i = from; i < to; i += ROWS) {
            /* the last two tiles fetch what the next panel is made from */
            const long left = (to - i - 1) / ROWS;
            const int ahead = left < 2 && panel + 1 < end && parts[0].how != LAID_OUT;
            one_tile(sum, panels, panel, i, to, ahead ? half_of(parts, panel + 1, left) : (Fetch){panels[0], 0});
        }
    }
}

void trimtab_rows_times(const uint16_t *x, long ldx, long rows, long k, const uint16_t *w, uint16_t *y, long ldy, long n) {
    const Part part = {x, ldx, k, w, 0, LAID_OUT};
    const Sum sum = {&part, 1, NULL, 0, y, ldy, rows, n};
    area(&sum, 0, rows, 0, panels_of(n));
}

/* y `[m, n]` with rows `ldy` apart = the sum over `parts` (PARTS at most), + bias `[n]` unless null. Where it is `gated`,
 * VEC columns of gates and VEC of what passes them take turns, and y is `[m, n / 2]`. */
void trimtab_products(const Part *parts, long count, const uint16_t *bias, int gated, uint16_t *y, long ldy, long m, long n,
                      int threads) {
    const Sum sum = {parts, count, bias, gated, y, ldy, m, n};
    const long panels = panels_of(n);
    int laid_out = 1;
    for (long p = 0; p < count; p++) laid_out &= parts[p].how == LAID_OUT;
    /* by rows if each thread has enough of them for its pass over W: what it writes it also reads, in the norm that comes next */
    const int by_rows = laid_out ? m >= 2 * ROWS * threads : panels < 3 * threads && m > ROWS * threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < threads; t++)
        if (by_rows)
            area(&sum, m * t / threads, m * (t + 1) / threads, 0, panels);
        else
            area(&sum, 0, m, panels * t / threads, panels * (t + 1) / threads);
}

#else

int trimtab_has_products(void) { return 0; }

#endif
