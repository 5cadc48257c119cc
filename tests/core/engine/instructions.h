// Forced in before step.cpp: the AVX512 and AVX-VNNI instructions it names, written out as Intel's manual describes each,
// so that a CPU without them runs these paths too.
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
/// sum + two products in each 32 bits, of signed numbers of 16 bits; it wraps round.
WRITTEN_OUT __m512i written_dpwssd(__m512i sum, __m512i a, __m512i b) {
    unsigned sums[16];
    short x[32], y[32];
    __builtin_memcpy(sums, &sum, 64);
    __builtin_memcpy(x, &a, 64);
    __builtin_memcpy(y, &b, 64);
    for (int i = 0; i < 32; i++) sums[i / 2] += (unsigned)(x[i] * y[i]);
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
/// Sixteen numbers of 16 bits as ones of 32, where `mask` has a bit.
WRITTEN_OUT __m512i written_widen(unsigned short mask, __m256i v) {
    unsigned short from[16];
    unsigned to[16];
    __builtin_memcpy(from, &v, 32);
    for (int i = 0; i < 16; i++) to[i] = mask >> i & 1 ? from[i] : 0;
    return written_loadu(to);
}
/// Sixteen numbers of float16 as floats, where `mask` has a bit.
WRITTEN_OUT __m512 written_widen_halves(unsigned short mask, __m256i v) {
    unsigned short from[16];
    __m512 to;
    __builtin_memcpy(from, &v, 32);
    for (int i = 0; i < 16; i++) {
        unsigned bits = (unsigned)(from[i] & 0x7FFF) << 13;
        float size;
        __builtin_memcpy(&size, &bits, 4);
        to[i] = mask >> i & 1 ? (from[i] >> 15 ? -0x1p112f : 0x1p112f) * size : 0;
    }
    return to;
}
/// Thirty-two bytes, signed, as numbers of 16 bits.
WRITTEN_OUT __m512i written_widen_bytes(__m256i v) {
    signed char from[32];
    short to[32];
    __builtin_memcpy(from, &v, 32);
    for (int i = 0; i < 32; i++) to[i] = from[i];
    return written_loadu(to);
}
/// sum + two products of bfloat16 in each 32 bits, the upper ones first. (Numbers below the normal ones stay here.)
WRITTEN_OUT __m512 written_dpbf16(__m512 sum, __m512i a, __m512i b) {
    unsigned x[16], y[16];
    __builtin_memcpy(x, &a, 64);
    __builtin_memcpy(y, &b, 64);
    for (int half = 1; half >= 0; half--)
        for (int i = 0; i < 16; i++) {
            unsigned bits[2] = {half ? x[i] & 0xFFFF0000u : x[i] << 16, half ? y[i] & 0xFFFF0000u : y[i] << 16};
            float one[2];
            __builtin_memcpy(one, bits, 8);
            sum[i] = __builtin_fmaf(one[0], one[1], sum[i]);
        }
    return sum;
}
/// The nearest bfloat16 of each float; NaN stays NaN.
WRITTEN_OUT __m256i written_narrow(__m512 v) {
    unsigned bits[16];
    unsigned short to[16];
    __builtin_memcpy(bits, &v, 64);
    for (int i = 0; i < 16; i++)
        to[i] = (bits[i] & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (bits[i] + 0x7FFF + (bits[i] >> 16 & 1)) >> 16;
    __m256i all;
    __builtin_memcpy(&all, to, 32);
    return all;
}
/// The products of registers half as wide, with those above.
WRITTEN_OUT __m512i written_wide(__m256i v) {
    __m512i wide = {};
    __builtin_memcpy(&wide, &v, 32);
    return wide;
}
WRITTEN_OUT __m256i written_half(__m512i v) {
    __m256i half;
    __builtin_memcpy(&half, &v, 32);
    return half;
}
#define _mm256_dpbusd_avx_epi32(sum, a, b) written_half(written_dpbusd(written_wide(sum), written_wide(a), written_wide(b)))
#define _mm256_dpwssd_avx_epi32(sum, a, b) written_half(written_dpwssd(written_wide(sum), written_wide(a), written_wide(b)))
#define __m512bh __m512i
#define _mm512_dpbf16_ps written_dpbf16
#define _mm512_cvtneps_pbh written_narrow
#define _mm512_maskz_cvtepu16_epi32 written_widen
#define _mm512_maskz_cvtph_ps written_widen_halves
#define _mm512_fmadd_ps written_fmadd
#define _mm512_dpbusd_epi32 written_dpbusd
#define _mm512_loadu_si512 written_loadu
#define _mm512_set1_epi32 written_set1
#define _mm512_dpwssd_epi32 written_dpwssd
#define _mm512_cvtepi8_epi16 written_widen_bytes
