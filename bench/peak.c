/* The most that a CPU's bfloat16 units do, whoever writes the program: a loop of nothing but vdpbf16ps, 32 multiplications and additions
 * each, on twelve registers, so that none waits for another; nothing is read from memory.
 *
 *     gcc -O2 -pthread bench/peak.c -o peak && ./peak 1 && ./peak 2        (x86-64 with AVX512-BF16; the argument is the number of threads)
 *
 * Two threads that reach no more than one are two threads of one core, which share its units.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define ROUNDS 20000000L
#define INTO(n) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n "\n\t"

static void *multiply(void *unused) {
    for (long round = 0; round < ROUNDS; round++)
        __asm__ volatile(INTO(0) INTO(1) INTO(2) INTO(3) INTO(4) INTO(5) INTO(6) INTO(7) INTO(8) INTO(9) INTO(10) INTO(11)
                         ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
    return unused;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int count, char **words) {
    int threads = count > 1 ? atoi(words[1]) : 1;
    if (threads < 1 || threads > 64) return 2;
    for (int repeat = 0; repeat < 5; repeat++) {
        pthread_t own[64];
        double start = now();
        for (int i = 0; i < threads; i++) pthread_create(&own[i], NULL, multiply, NULL);
        for (int i = 0; i < threads; i++) pthread_join(own[i], NULL);
        printf("%d threads: %.0f GFLOP/s\n", threads, threads * ROUNDS * 12 * 64 / (now() - start) * 1e-9);
    }
    return 0;
}
