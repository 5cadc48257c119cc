// Forced in before step.cpp: the AVX512 instructions it names, written out as Intel's manual describes each, so that
// a CPU without them runs that path too.
#include <immintrin.h>

#define WRITTEN_OUT static inline __attribute__((always_inline))

/// a * b + c of each float, rounded once.
WRITTEN_OUT __m512 written_fmadd(__m512 a, __m512 b, __m512 c) {
    for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
/// sum + four products in each 32 bits, of a's unsigned and b's signed bytes; it wraps round and never saturates.
WRITTEN_OUT __m512i written_dpbusd(__m512i sum, __m512i a, __m512i b) {
    unsigned sums[16];
    unsigned char x[64];
    signed char y[64];
    __builtin_memcpy(sums, &sum, 64);
    __builtin_memcpy(x, &a, 64);
    __builtin_memcpy(y, &b, 64);
    for (int i = 0; i < 64; i++) sums[i / 4] += (unsigned)(x[i] * y[i]);
    __builtin_memcpy(&sum, sums, 64);
    return sum;
}
WRITTEN_OUT __m512i written_loadu(const void *from) {
    __m512i v;
    __builtin_memcpy(&v, from, 64);
    return v;
}
WRITTEN_OUT __m512i written_set1(int value) {
    int all[16];
    for (int i = 0; i < 16; i++) all[i] = value;
    return written_loadu(all);
}

#define _mm512_fmadd_ps written_fmadd
#define _mm512_dpbusd_epi32 written_dpbusd
#define _mm512_loadu_si512 written_loadu
#define _mm512_set1_epi32 written_set1
