/* Attention of one packed sequence and its backward pass, for `models/attention.py`, where it is said who sees whom.
 *
 * The sequence is a tree of segments: a token sees what precedes it in its own segment and its segment's ancestors, all of them. Keys and
 * values are laid out once for a key head, each segment from a multiple of VEC on, zeros between; then a block of queries multiplies with
 * one range after the other of what it sees, and nothing masked is computed but the end of a vector and the triangle within a block.
 *
 * Shapes: n tokens, h query heads, g = h / j of them to each of j key heads, e numbers a head (a multiple of VEC); a block has `rows` rows,
 * g for each of its tokens, and c columns, the padded lengths of its ranges.
 */
#include "vectors.h"

typedef struct {
    long count, columns;                       /* segments, and columns of the layout */
    const int64_t *starts, *ends, *parents;    /* of each; a parent before its children, -1: none */
    const int64_t *places;                     /* where each begins in the layout */
} Tree;

typedef struct {
    const void *numbers;
    long token, head; /* steps from one to the next */
} Heads;

typedef struct {
    long segment, first, tokens, columns, depth;
} Block;

typedef struct {
    long place, real, offset; /* column of the layout, keys there, column in the block's scores */
} Range;

enum { TOKENS = 32, SCORES = 1 << 16 }; /* of a block at most: tokens, and scores (256 KB) unless it is one token */

static Block *cut(const Tree *tree, long g, long *count) {
    long size = 0, *shared = malloc((size_t)tree->count * 2 * sizeof(long)), *depth = shared + tree->count;
    if (!shared) abort();
    for (long s = 0; s < tree->count; s++) {
        long parent = tree->parents[s], length = tree->ends[s] - tree->starts[s];
        shared[s] = parent < 0 ? 0 : shared[parent] + padded(tree->ends[parent] - tree->starts[parent]);
        depth[s] = parent < 0 ? 1 : depth[parent] + 1;
        size += length;
    }
    Block *blocks = malloc((size_t)(size + 1) * sizeof(Block));
    if (!blocks) abort();
    *count = 0;
    for (long s = 0; s < tree->count; s++)
        for (long first = 0, length = tree->ends[s] - tree->starts[s]; first < length;) {
            long tokens = SCORES / (g * (shared[s] + padded(length)));
            tokens = tokens < 1 ? 1 : tokens > TOKENS ? TOKENS : tokens;
            if (tokens > length - first) tokens = length - first;
            blocks[(*count)++] = (Block){s, first, tokens, shared[s] + padded(first + tokens), depth[s]};
            first += tokens;
        }
    free(shared);
    return blocks;
}

/* What a block sees, its own segment last; a row of token t sees `first + t + 1` keys of that. */
static Range *ranges_of(const Tree *tree, const Block *block) {
    Range *ranges = (Range *)scratch(6, block->depth * (long)(sizeof(Range) / 4));
    long offset = block->columns - padded(block->first + block->tokens);
    ranges[block->depth - 1] = (Range){tree->places[block->segment], block->first + block->tokens, offset};
    for (long i = block->depth - 2, s = tree->parents[block->segment]; i >= 0; i--, s = tree->parents[s]) {
        long length = tree->ends[s] - tree->starts[s];
        offset -= padded(length);
        ranges[i] = (Range){tree->places[s], length, offset};
    }
    return ranges;
}

/* A segment of one head in the layout: `plain` `[columns, e]`, `turned` `[columns / VEC, e, VEC]`; either may be null. */
static void lay(const Tree *tree, long segment, const Heads *from, long head, long e, float *plain, float *turned, int narrow) {
    long length = tree->ends[segment] - tree->starts[segment], place = tree->places[segment];
    const void *own = at(from->numbers, tree->starts[segment] * from->token + head * from->head, narrow);
    for (long c = 0; c < length; c += VEC)
        for (long s = 0; s < e; s += VEC) {
            vec rows[VEC];
            for (int i = 0; i < VEC; i++)
                rows[i] = c + i < length ? load_any(own, (c + i) * from->token + s, narrow) : splat(0);
            if (plain)
                for (int i = 0; i < VEC; i++) store(plain + (place + c + i) * e + s, rows[i]);
            if (turned) {
                transpose(rows);
                for (int i = 0; i < VEC; i++) store(turned + (place + c) * e + (s + i) * VEC, rows[i]);
            }
        }
}

/* The rows of a block times `factor`, `[tokens g, e]` in float32. */
static void take(const Tree *tree, const Block *block, const Heads *from, long head, long g, long e, float factor, float *to, int narrow) {
    for (long t = 0; t < block->tokens; t++)
        for (long q = 0; q < g; q++, to += e) {
            long token = tree->starts[block->segment] + block->first + t;
            const void *own = at(from->numbers, token * from->token + (head * g + q) * from->head, narrow);
            for (long s = 0; s < e; s += VEC) store(to + s, load_any(own, s, narrow) * factor);
        }
}

/* the same back to out `[n, h, e]`, row r times `factors[r]` (or times `factor`) */
static void give(const Tree *tree, const Block *block, void *out, long head, long g, long j, long e, const float *from,
                 const float *factors, float factor, int narrow) {
    for (long t = 0; t < block->tokens; t++)
        for (long q = 0; q < g; q++, from += e) {
            long token = tree->starts[block->segment] + block->first + t;
            float own = factors ? factors[t * g + q] : factor;
            for (long s = 0; s < e; s += VEC) store_any(out, (token * j * g + head * g + q) * e + s, load(from + s) * own, narrow);
        }
}

/* scores `[rows, c]` of the rows with what they see */
static void products(const Block *block, const Range *ranges, long rows, long e, const float *x, const float *turned, float *scores) {
    for (long i = 0; i < block->depth; i++)
        multiply(rows, padded(ranges[i].real) / VEC, e, x, e, 1, turned + ranges[i].place * e, e * VEC, VEC, scores + ranges[i].offset,
                 block->columns, 0);
}

INLINE vec first_lanes(vec x, long real, float rest) {
    vec_i32 lanes;
    for (int i = 0; i < VEC; i++) lanes[i] = i;
    return real >= VEC ? x : either(lanes < (vec_i32){0} + (int32_t)real, x, splat(rest));
}

/* e^(score - greatest) in place of the scores of a row, 0 where it may not look; returns one over their sum. */
static float soften(const Block *block, const Range *ranges, long token, float *scores) {
    vec top = splat(-INFINITY), sums = splat(0);
    for (long i = 0; i < block->depth; i++) {
        long real = i < block->depth - 1 ? ranges[i].real : block->first + token + 1;
        float *own = scores + ranges[i].offset;
        for (long c = 0; c < real; c += VEC) {
            top = greater(first_lanes(load(own + c), real - c, -INFINITY), top);
        }
    }
    float most = greatest(top);
    for (long i = 0; i < block->depth; i++) {
        long real = i < block->depth - 1 ? ranges[i].real : block->first + token + 1;
        float *own = scores + ranges[i].offset;
        for (long c = 0; c < padded(ranges[i].real); c += VEC) {
            vec x = c < real ? first_lanes(exp_of(load(own + c) - most), real - c, 0) : splat(0);
            store(own + c, x);
            sums += x;
        }
    }
    return 1.0f / sum_of(sums);
}

/* q `[n, h, e]`, k and v `[n, j, e]`, each with the steps of its tokens and heads -> out `[n, h, e]`: softmax(q k^T scale) v. */
void trimtab_tree(const void *q, long q_token, long q_head, const void *k, long k_token, long k_head, const void *v, long v_token,
                  long v_head, void *out, long count, const int64_t *starts, const int64_t *ends, const int64_t *parents,
                  const int64_t *places, long columns, float *room, float scale, long h, long j, long e, int narrow, int threads) {
    const Tree tree = {count, columns, starts, ends, parents, places};
    const Heads queries = {q, q_token, q_head}, keys = {k, k_token, k_head}, values = {v, v_token, v_head};
    const long g = h / j, size = columns * e;
    long amount;
    Block *blocks = cut(&tree, g, &amount);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long task = 0; task < j * count; task++) {
            float *turned = room + task / count * 2 * size;
            lay(&tree, task % count, &keys, task / count, e, NULL, turned, narrow);
            lay(&tree, task % count, &values, task / count, e, turned + size, NULL, narrow);
        }
#pragma omp for schedule(dynamic)
        for (long task = 0; task < j * amount; task++) {
            const Block *block = blocks + task % amount;
            const Range *ranges = ranges_of(&tree, block);
            long head = task / amount, rows = block->tokens * g, c = block->columns;
            float *turned = room + head * 2 * size, *plain = turned + size;
            float *x = scratch(0, rows * (2 * e + 1)), *sums = x + rows * e, *shares = sums + rows * e, *scores = scratch(1, rows * c);
            take(&tree, block, &queries, head, g, e, scale, x, narrow);
            products(block, ranges, rows, e, x, turned, scores);
            for (long r = 0; r < rows; r++) shares[r] = soften(block, ranges, r / g, scores + r * c);
            for (long i = 0; i < block->depth; i++)
                multiply(rows, e / VEC, ranges[i].real, scores + ranges[i].offset, c, 1, plain + ranges[i].place * e, VEC, e, sums, e,
                         i > 0);
            give(&tree, block, out, head, g, j, e, sums, shares, 0, narrow);
        }
    }
    free(blocks);
}

/* One block's part of the gradients: that of its queries to grad_q, those of what it sees added to key_sums and value_sums. */
static void block_back(const Tree *tree, const Block *block, const Heads *queries, const Heads *grads, long head, long g, long j, long e,
                       float scale, const float *key_turned, const float *key_plain, const float *value_turned, void *grad_q,
                       float *key_sums, float *value_sums, int narrow) {
    const Range *ranges = ranges_of(tree, block);
    const long rows = block->tokens * g, c = block->columns;
    float *x = scratch(0, rows * 3 * e), *pull = x + rows * e, *sums = pull + rows * e;
    float *p = scratch(1, rows * c), *slope = scratch(2, rows * c);
    take(tree, block, queries, head, g, e, scale, x, narrow);
    take(tree, block, grads, head, g, e, 1, pull, narrow);
    products(block, ranges, rows, e, x, key_turned, p);
    products(block, ranges, rows, e, pull, value_turned, slope);
    for (long r = 0; r < rows; r++) {
        /* through the softmax: p (dp - sum(p dp)) */
        float *own = p + r * c, *back = slope + r * c, share = soften(block, ranges, r / g, own);
        vec dots = splat(0);
        for (long i = 0; i < c; i += VEC) {
            vec probability = load(own + i) * share;
            store(own + i, probability);
            dots += probability * load(back + i);
        }
        float mean = sum_of(dots);
        for (long i = 0; i < c; i += VEC) store(back + i, load(own + i) * (load(back + i) - mean));
    }
    for (long i = 0; i < block->depth; i++) {
        const Range *range = ranges + i;
        float *own = p + range->offset, *back = slope + range->offset;
        multiply(rows, e / VEC, range->real, back, c, 1, key_plain + range->place * e, VEC, e, sums, e, i > 0);
        multiply(range->real, e / VEC, rows, own, 1, c, pull, VEC, e, value_sums + range->place * e, e, 1);
        multiply(range->real, e / VEC, rows, back, 1, c, x, VEC, e, key_sums + range->place * e, e, 1);
    }
    give(tree, block, grad_q, head, g, j, e, sums, NULL, scale, narrow);
}

/* The gradients of q, k and v, `[n, h, e]` and `[n, j, e]` one after the other, from grad, which is as q is. Threads add up on their own and
 * are added in their order: the same number of threads gives the same bits.
 *
 * room: `(3 + 2 threads) columns e` floats. */
void trimtab_tree_back(const void *q, long q_token, long q_head, const void *k, long k_token, long k_head, const void *v, long v_token,
                       long v_head, const void *grad, long grad_token, long grad_head, void *grad_q, void *grad_k, void *grad_v, long count,
                       const int64_t *starts, const int64_t *ends, const int64_t *parents, const int64_t *places, long columns,
                       float *room, float scale, long h, long j, long e, int narrow, int threads) {
    const Tree tree = {count, columns, starts, ends, parents, places};
    const Heads queries = {q, q_token, q_head}, keys = {k, k_token, k_head}, values = {v, v_token, v_head};
    const Heads grads = {grad, grad_token, grad_head};
    const long g = h / j, size = columns * e;
    float *key_turned = room, *key_plain = room + size, *value_turned = room + 2 * size, *sums = room + 3 * size;
    long amount, *from = malloc((size_t)(threads + 1) * sizeof(long));
    Block *blocks = cut(&tree, g, &amount);
    if (!from) abort();
    double whole = 0, part = 0;
    for (long b = 0; b < amount; b++) whole += (double)blocks[b].tokens * blocks[b].columns;
    for (long b = 0, t = 0; t <= threads; t++) {
        for (; b < amount && (t == threads || part < whole * t / threads); b++) part += (double)blocks[b].tokens * blocks[b].columns;
        from[t] = t == threads ? amount : b;
    }
    for (long head = 0; head < j; head++) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (long s = 0; s < count; s++) {
                lay(&tree, s, &keys, head, e, key_plain, key_turned, narrow);
                lay(&tree, s, &values, head, e, NULL, value_turned, narrow);
            }
            /* a loop and not the number of the thread: fewer threads than asked for do all the work too */
#pragma omp for schedule(static, 1)
            for (long t = 0; t < threads; t++) {
                float *own = sums + t * 2 * size;
                memset(own, 0, (size_t)(2 * size) * 4);
                for (long b = from[t]; b < from[t + 1]; b++)
                    block_back(&tree, blocks + b, &queries, &grads, head, g, j, e, scale, key_turned, key_plain, value_turned, grad_q, own,
                               own + size, narrow);
            }
#pragma omp for schedule(static)
            for (long s = 0; s < count; s++)
                for (long token = starts[s]; token < ends[s]; token++)
                    for (long i = 0; i < 2 * e; i += VEC) {
                        const float *own = sums + (i < e ? 0 : size) + (places[s] + token - starts[s]) * e + i % e;
                        vec sum = load(own);
                        for (long t = 1; t < threads; t++) sum += load(own + t * 2 * size);
                        store_any(i < e ? grad_k : grad_v, (token * j + head) * e + i % e, sum, narrow);
                    }
        }
    }
    free(from);
    free(blocks);
}

/* VEC of this build: e must be a multiple of it */
int trimtab_vector(void) { return VEC; }
