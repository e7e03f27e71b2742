/* Vectors of float, numbers of 16 bits and back, and one small matrix product: what the other files here are made of.
 *
 * `narrow` says of an array of a model's numbers that they are bfloat16, else they are float32. All arithmetic is float32. The compiler
 * turns its own vector types into the instructions of the machine that it compiles for; one it does not find is named here.
 */
#ifndef TRIMTAB_VECTORS
#define TRIMTAB_VECTORS

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#ifndef __AMX_BF16__
#define HAS_PRODUCTS /* those of products.c */
#endif
#endif

/* numbers of a vector, and the tile of a product that fits the registers: TALL rows by WIDE vectors */
#if defined(__AVX512F__)
#define VEC 16
#define WIDE 4
#elif defined(__AVX__)
#define VEC 8
#define WIDE 2
#else
#define VEC 4
#define WIDE 4
#endif
#define TALL 6

#define INLINE static inline __attribute__((always_inline))

typedef float vec_4 __attribute__((vector_size(16)));
typedef float vec __attribute__((vector_size(4 * VEC)));
typedef int32_t vec_i32 __attribute__((vector_size(4 * VEC)));
typedef uint32_t vec_u32 __attribute__((vector_size(4 * VEC)));
typedef uint16_t vec_u16 __attribute__((vector_size(2 * VEC)));

INLINE long padded(long n) { return (n + VEC - 1) / VEC * VEC; }

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec load(const float *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(float *to, vec x) { memcpy(to, &x, sizeof x); }

INLINE float sum_of(vec x) {
    vec_4 parts[VEC / 4];
    memcpy(parts, &x, sizeof x);
#pragma GCC unroll 2
    for (int half = VEC / 8; half; half /= 2)
#pragma GCC unroll 2
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

/* bfloat16 is the upper half of a float32; rounded to nearest, ties to even, nan stays nan */
INLINE uint16_t rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float widened(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

INLINE vec load_any(const void *from, long i, int narrow) {
    if (!narrow) return load((const float *)from + i);
    vec_u16 half;
    memcpy(&half, (const uint16_t *)from + i, sizeof half);
    return (vec)(__builtin_convertvector(half, vec_u32) << 16);
}

INLINE vec_u16 rounded_vec(vec x) {
#ifdef __AVX512BF16__
    return (vec_u16)_mm512_cvtneps_pbh((__m512)x);
#else
    vec_u32 bits = (vec_u32)x, nan = (vec_u32)(x != x);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector((bits & ~nan) | (0x7fc0 & nan), vec_u16);
#endif
}

INLINE void store_any(void *to, long i, vec x, int narrow) {
    if (!narrow) {
        store((float *)to + i, x);
        return;
    }
    vec_u16 half = rounded_vec(x);
    memcpy((uint16_t *)to + i, &half, sizeof half);
}

/* the number that is left after storing it */
INLINE vec kept(vec x, int narrow) {
    return narrow ? (vec)(__builtin_convertvector(rounded_vec(x), vec_u32) << 16) : x;
}

INLINE float kept_one(float x, int narrow) { return narrow ? widened(rounded(x)) : x; }

INLINE float get(const void *from, long i, int narrow) {
    return narrow ? widened(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE void put(void *to, long i, float x, int narrow) {
    if (narrow)
        ((uint16_t *)to)[i] = rounded(x);
    else
        ((float *)to)[i] = x;
}

INLINE const void *at(const void *array, long i, int narrow) { return (const char *)array + i * (narrow ? 2 : 4); }
INLINE void *at_mutable(void *array, long i, int narrow) { return (char *)array + i * (narrow ? 2 : 4); }

/* n numbers to float32 */
INLINE void widen(float *to, const void *from, long n, int narrow) {
    long i = 0;
    for (; i + VEC <= n; i += VEC) store(to + i, load_any(from, i, narrow));
    for (; i < n; i++) to[i] = get(from, i, narrow);
}

INLINE void narrow_down(void *to, const float *from, long n, int narrow) {
    long i = 0;
    for (; i + VEC <= n; i += VEC) store_any(to, i, load(from + i), narrow);
    for (; i < n; i++) put(to, i, from[i], narrow);
}

INLINE vec either(vec_i32 which, vec yes, vec no) { return (vec)(((vec_i32)yes & which) | ((vec_i32)no & ~which)); }

/* the greater numbers; of a number and nan in x, y */
INLINE vec greater(vec x, vec y) { return either(x > y, x, y); }

INLINE float greatest(vec x) {
    float top = x[0];
    for (int i = 1; i < VEC; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* e^x to 2 in 10^7: 2^n e^r with r in [-ln 2 / 2, ln 2 / 2], a polynomial of degree 7 (Cephes' coefficients); 0 below e^-87, infinity
 * above e^88 */
INLINE vec exp_of(vec x) {
    const vec_i32 nothing = x < -87.0f, too_much = x > 88.0f; /* nan is neither, and stays */
    const vec magic = splat(12582912.0f); /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    vec t = x * 1.44269504088896341f + magic;
    vec n = t - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    p = either(too_much, splat(INFINITY), p * (vec)(((vec_u32)t - 0x4b400000u + 127u) << 23));
    return either(nothing, splat(0), p);
}

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp_of(-x)); }

#if VEC == 16
#define LOW {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}
#elif VEC == 8
#define LOW {0, 8, 1, 9, 2, 10, 3, 11}
#else
#define LOW {0, 4, 1, 5}
#endif

/* VEC rows of VEC numbers, in place: log2(VEC) times the first half of the rows is interleaved with the second. */
INLINE void transpose(vec *rows) {
    const vec_i32 low = LOW, high = low + VEC / 2;
#pragma GCC unroll 4
    for (int round = 1; round < VEC; round *= 2) {
        vec next[VEC];
#pragma GCC unroll 16
        for (int i = 0; i < VEC / 2; i++) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + VEC / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + VEC / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VEC; i++) rows[i] = next[i];
    }
}

/* The sum of each of VEC rows, which are overwritten: `transpose` and adding up, at once. */
INLINE vec sums_of(vec *rows) {
    const vec_i32 low = LOW, high = low + VEC / 2;
#pragma GCC unroll 4
    for (int half = VEC / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            rows[i] = __builtin_shuffle(rows[i], rows[i + half], low) + __builtin_shuffle(rows[i], rows[i + half], high);
    return rows[0];
}

/* Memory of the calling thread that stays until the thread asks for more; `which`: one of several pieces. */
INLINE float *scratch(int which, long floats) {
    static _Thread_local struct {
        float *memory;
        long size;
    } pieces[8];
    if (pieces[which].size < floats) {
        free(pieces[which].memory);
        pieces[which].size = floats + floats / 4 + 64;
        pieces[which].memory = aligned_alloc(64, (size_t)(pieces[which].size * 4 + 63) / 64 * 64);
        if (!pieces[which].memory) abort(); /* as an operating system out of memory would have it anyway */
    }
    return pieces[which].memory;
}

/* One tile of `multiply`: m rows by v vectors, all sums in registers. */
INLINE void tile(const int m, const int v, long k, const float *a, long row, long column, const void *b, long apart, long next,
                 float *c, long ldc, int add, const int narrow) {
    vec sums[TALL][WIDE];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < v; j++) sums[i][j] = add ? load(c + i * ldc + j * VEC) : splat(0);
    for (long s = 0; s < k; s++) {
        vec right[WIDE];
#pragma GCC unroll 8
        for (int j = 0; j < v; j++) right[j] = load_any(b, j * apart + s * next, narrow);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            vec left = splat(a[i * row + s * column]);
#pragma GCC unroll 8
            for (int j = 0; j < v; j++) sums[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 8
        for (int j = 0; j < v; j++) store(c + i * ldc + j * VEC, sums[i][j]);
}

/* C (+)= A B in float32 (B may be narrow): C `[m, v vectors]` with rows `ldc` apart, A `[m, k]` with the steps `row` and `column`, and of B
 * the vector j of row s at `b + j apart + s next`. */
INLINE void multiply_any(long m, long v, long k, const float *a, long row, long column, const void *b, long apart, long next, float *c,
                         long ldc, int add, const int narrow) {
#define TILE(M, V)                                                                                                                     \
    case 8 * M + V:                                                                                                                    \
        tile(M, V, k, a + i * row, row, column, at(b, j * apart, narrow), apart, next, c + i * ldc + j * VEC, ldc, add, narrow);       \
        break;
    for (long j = 0; j < v; j += WIDE)
        for (long i = 0; i < m; i += TALL) {
            long tall = m - i < TALL ? m - i : TALL, wide = v - j < WIDE ? v - j : WIDE;
            switch (8 * tall + wide) {
                TILE(6, 1) TILE(5, 1) TILE(4, 1) TILE(3, 1) TILE(2, 1) TILE(1, 1)
                TILE(6, 2) TILE(5, 2) TILE(4, 2) TILE(3, 2) TILE(2, 2) TILE(1, 2)
#if WIDE > 2
                TILE(6, 3) TILE(5, 3) TILE(4, 3) TILE(3, 3) TILE(2, 3) TILE(1, 3)
                TILE(6, 4) TILE(5, 4) TILE(4, 4) TILE(3, 4) TILE(2, 4) TILE(1, 4)
#endif
            }
        }
#undef TILE
}

/* not every file needs both */
#define UNUSED __attribute__((unused))

UNUSED static void multiply(long m, long v, long k, const float *a, long row, long column, const float *b, long apart, long next, float *c,
                            long ldc, int add) {
    multiply_any(m, v, k, a, row, column, b, apart, next, c, ldc, add, 0);
}

UNUSED static void multiply_narrow(long m, long v, long k, const float *a, long row, long column, const void *b, long apart, long next,
                                   float *c, long ldc, int add) {
    multiply_any(m, v, k, a, row, column, b, apart, next, c, ldc, add, 1);
}

#endif
