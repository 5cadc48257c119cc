// One step of GPT-2 on a CPU: rows of many sequences side by side. Weights are float32, bfloat16, or int8 in blocks of
// 32, as are the activations that int8 meets; keys and values are as the weights, and beside int8 as another model's, too.
// All other numbers are float32. Weights of 16 bits beside keys and values of float32 are a float32 model's that was stored
// so: float16 or bfloat16, from which the same numbers are made, and the same bits.
//
// A row's numbers are the same bits alone, in any batch, with its prompt cut anyhow, on any number of threads: integers
// add up exactly, and floats are added lane by lane in an order that only the row's own position decides. All paths
// below give these bits, but for
//   portable       where the processor has no fused multiply-add (nothing is fused that is not written so: build with
//                  -ffp-contract=off);
//   AVX512-BF16    in bfloat16: what meets weights and keys of it is rounded to it, too.
// What is not finite stays so: in int8 a block with such a number gets the scale NaN, and so do all logits of its row,
// and of its row alone.
//
// Layouts, all padded with zeros; a group of 32 columns is read in one run. PER numbers stand together: 1 of float32 or
// float16, 2 of bfloat16, 4 of int8:
//   weight   [n / 32][k / PER][32 columns][PER]  float32, float16 or bfloat16
//            [n / 32][k / 32][8][32 columns][4]  int8: w + 128 as uint8
//   scale    [n / 32][k / 32][32 columns]        bfloat16, int8 only: w = (byte - 128) * scale
//   a page of 128 positions' keys and values
//            [layer][2][head][128][width]        width is head_dim rounded up to 32; keys stand transposed in tiles of 16
//                                                positions ([8][width / PER][16][PER]), values as [128 / PER][width][PER]
//            [layer][2][head][8]                 int8: a tile of keys, each + 128 as uint8, or of values, [8][width][2], and
//            [16][width + width / 8]             behind it its scales [width / 32][16] float32: one for each 32 numbers
//                                                of a key, one for a value
//
// The lower half of the file is compiled once for each path, by including itself; `PATH` names the path.
#ifndef PATH
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#include <sys/auxv.h>
#endif

extern "C" {
struct Linear { const void *weight; const uint16_t *scale; const float *bias; int32_t blocks, groups; };  // of k, of n
struct Norm { const float *weight, *bias; };
struct Layer { Norm ln_1, ln_2; Linear c_attn, attn_c_proj, c_fc, mlp_c_proj; float attention_scale; };
struct Model {
    const Layer *layers; Linear wte, lm_head; const float *wpe; Norm ln_f;
    int32_t n_layer, n_head, n_embd, n_positions, activation, weights, keys; float epsilon;
};
struct Span { void *const *pages; int32_t start, count, row; };  // `count` rows of a sequence, from `row` of the batch
struct Step {
    const Span *spans; const int32_t *ids, *positions, *wanted; int32_t n_spans, rows, n_wanted, threads;
    float *x, *wide, *mixed, *logits;                       // rows x e, rows x wide, rows x e, wanted x vocabulary
    float *tops, *sums; double *totals;                     // of logits: wanted x groups padded to 16, twice, and wanted
    float *scratch;                                         // threads x 4 x (2 x positions padded to 16 + head width to 32)
    void *narrow;                                           // rows x (e + wide), as products read them: bfloat16 or blocks
};
struct Draw { const float *x, *tops; uint64_t seed; double temperature, top_p; int32_t n, k, banned, position; };
}

namespace {
enum Weights { INT8, BFLOAT16, FLOAT32, FLOAT16 };
enum After { STORE, ADD, RELU, TANH, ERF, LOGITS };
constexpr int QUERIES = 4, PAGE = 128;
constexpr float ROUND = 0x1.8p23f;  // added to a small number, it leaves the nearest whole one in the lowest bits
constexpr int32_t ROUND_BITS = 0x4B400000;
struct Half { uint16_t bits; };
template <class K> constexpr int PER = 4 / sizeof(K);
template <> constexpr int PER<Half> = 1;
inline float one(const Half *p) {
    const uint32_t bits = (uint32_t)(p->bits & 0x7FFF) << 13;
    float v;
    memcpy(&v, &bits, 4);
    return (p->bits >> 15 ? -0x1p112f : 0x1p112f) * v;  // its exponent counts from elsewhere
}

/// Threads that do one job together, all the same code, and wait for each other at the end of each loop. Whoever waits is
/// awake for a while, which saves waking up, and then sleeps, for it may have the core of the one it waits for: between
/// steps that is long enough for a token to be drawn, within them, where there are a hundred loops, it is short.
class Team {
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::microseconds LOOP{30}, LONG_LOOP{150}, STEP{1000};

  public:
    ~Team() { resize(1); }
    /// job() on so many threads, this one among them. Where loops take long, so does waiting for the last one of each.
    void run(int threads, const std::function<void()> &all_do, bool are_long = false) {
        resize(threads);
        job = &all_do;
        loop = are_long ? LONG_LOOP : LOOP;
        meet(loop);
        all_do();
        meet(loop);
    }
    /// To be called by all together: body(i) once for each i below n, so many at a time.
    template <class F> void each(int n, int chunk, F body) {
        for (int from; (from = take(chunk)) < n;)
            for (int i = from; i < n && i < from + chunk; i++) body(i);
        meet(loop);
    }
    /// body(i, then): this thread's next will be `then`, n or more where none is left.
    template <class F> void each_then(int n, int chunk, F body) {
        for (int from = take(chunk), then; from < n; from = then) {
            then = take(chunk);
            const int end = std::min(n, from + chunk);
            for (int i = from; i < end; i++) body(i, i + 1 < end ? i + 1 : then);
        }
        meet(loop);
    }
    /// Shares of a loop that are even and yet leave nobody waiting long.
    int share(int n) const { return n / (8 * size) + 1; }
    /// Which of the team's threads calls.
    static inline thread_local int number = 0;

  private:
    int take(int chunk) { return next.fetch_add(chunk, std::memory_order_relaxed); }
    void resize(int threads) {
        if (threads == asked) return;
        asked = threads;
        job = nullptr;
        meet(LOOP);
        for (auto &helper : helpers) helper.join();
        helpers.clear();
        size = threads;
        try {
            for (int i = 1; i < threads; i++)
                helpers.emplace_back([this, i] {
                    number = i;
                    for (meet(STEP); job; meet(STEP)) {
                        (*job)();
                        meet(loop);
                    }
                });
        } catch (const std::system_error &) {  // no more are to be had: those that are there do it
            size = 1 + (int)helpers.size();
        }
    }
    void meet(Clock::duration awake) {
        const unsigned now = round;
        if (++arrived == size) {  // the last one opens the door
            arrived = next = 0;
            round = now + 1;
            if (!asleep) return;
            std::lock_guard<std::mutex> lock(bed);
            wake.notify_all();
            return;
        }
        for (const auto until = Clock::now() + awake; round == now && Clock::now() < until;)
            for (int i = 0; i < 32 && round == now; i++) relax();
        if (round != now) return;
        std::unique_lock<std::mutex> lock(bed);
        asleep++;
        wake.wait(lock, [&] { return round != now; });
        asleep--;
    }
    static void relax() {
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    int asked = 1;
    std::vector<std::thread> helpers;
    const std::function<void()> *job = nullptr;
    Clock::duration loop = LOOP;
    std::atomic<int> size{1}, next{0}, arrived{0}, asleep{0};
    std::atomic<unsigned> round{0};
    std::mutex bed;
    std::condition_variable wake;
};
/// Of the calling thread.
Team &team() {
    static thread_local Team own;
    return own;
}
}
#define INLINE static inline __attribute__((always_inline))

#define PATH portable
#include "step.cpp"
#undef PATH
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PATHS 5
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define PATH avx2
#define PATH_AVX2
#include "step.cpp"
#undef PATH
#if __GNUC__ > 10  // the first that knows it; elsewhere the path is AVX2's
#pragma GCC target("avxvnni")
#define PATH_VNNI
#endif
#define PATH avxvnni
#define PATH_INT8
#include "step.cpp"
#undef PATH
#undef PATH_INT8
#undef PATH_AVX2
#undef PATH_VNNI
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")
#define PATH avx512vnni
#define PATH_AVX512
#include "step.cpp"
#undef PATH
#pragma GCC target("avx512bf16")
#define PATH avx512bf16
#define PATH_BF16
#include "step.cpp"
#undef PATH
#pragma GCC pop_options
#elif defined(__aarch64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define PATHS 2
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#define PATH dotprod
#define PATH_DOTPROD
#include "step.cpp"
#undef PATH
#pragma GCC pop_options
#else
#define PATHS 1
#endif

// How weights are packed, once at start.
namespace {
using portable::keep;
using portable::one;
/// A number that float16 has.
void keep(Half *p, float v) {
    const float size = fabsf(v) * 0x1p-112f;
    uint32_t bits;
    memcpy(&bits, &size, 4);
    p->bits = (uint16_t)(bits >> 13 | (uint32_t)std::signbit(v) << 15);
}
/// A block of 32 numbers of 32 columns, x [number][column], as bytes of `fours`, and each column's scale: bfloat16, rounded up, so
/// that no number is cut off.
void pack_block(const float (&x)[32][32], uint32_t *fours, uint16_t *scales) {
    float most[32] = {}, scale[32];
    for (auto &row : x)
        for (int i = 0; i < 32; i++) most[i] = fabsf(row[i]) > most[i] ? fabsf(row[i]) : most[i];
    for (int i = 0; i < 32; i++) {
        const float exact = most[i] / 127.0f;
        keep(scales + i, exact);
        if (one(scales + i) < exact) scales[i]++;
        scale[i] = one(scales + i) > 1e-30f ? one(scales + i) : 1e-30f;
    }
    for (int j = 0; j < 32; j += 4)
        for (int i = 0; i < 32; i++) {
            uint32_t four = 0;
            for (int b = 0; b < 4; b++) four |= (uint32_t)(int)((x[j + b][i] / scale[i] + ROUND) - (ROUND - 128.0f)) << 8 * b;
            fours[j / 4 * 32 + i] = four;  // the nearest of each, + 128
        }
}
template <class S> void pack(const S *source, int64_t stride_n, int64_t stride_k, int n, int k, void *packed, uint16_t *scales, int weights, int threads) {
    const int groups = (n + 31) / 32, blocks = (k + 31) / 32;
    const auto pack_tile = [&](int tile) {  // in the order in which the source stands
        const int group = stride_n < stride_k ? tile % groups : tile / blocks, first_n = 32 * group;
        const int block = stride_n < stride_k ? tile / groups : tile % blocks, first_k = 32 * block;
        const size_t at = (size_t)group * blocks + block;
        const int wide = std::min(32, n - first_n), high = std::min(32, k - first_k);
        float x[32][32] = {};
        for (int j = 0; j < high; j++) {
            const S *from = source + first_n * stride_n + (first_k + j) * stride_k;
            for (int i = 0; i < wide; i++) x[j][i] = one(from + i * stride_n);
        }
        if (weights == INT8) pack_block(x, (uint32_t *)packed + at * 256, scales + at * 32);
        if (weights == FLOAT32) memcpy((float *)packed + at * 1024, x, sizeof x);
        if (weights == FLOAT16)
            for (int i = 0; i < 1024; i++) keep((Half *)packed + at * 1024 + i, x[i / 32][i % 32]);
        if (weights == BFLOAT16)
            for (int i = 0; i < 1024; i++) keep((uint16_t *)packed + at * 1024 + i, x[i / 64 * 2 + i % 2][i % 64 / 2]);
    };
    Team &all = team();
    all.run(threads, [&] { all.each(groups * blocks, 8, pack_tile); });
}
}

extern "C" {
/// Which version of the structures, layouts and functions this is.
int palaver_layout() { return 13; }

/// Can this CPU take a path: 0 portable, 1 AVX2, 2 AVX-VNNI, 3 AVX512-VNNI, 4 AVX512-BF16; on Arm 1 is dotprod?
bool palaver_runs(int path) {
#if PATHS == 5
#define HAS __builtin_cpu_supports
    __builtin_cpu_init();
#if __GNUC__ > 10  // the first that knows the last of each
    if (path == 1) return HAS("avx2") && HAS("fma") && HAS("f16c");
    if (path == 2) return palaver_runs(1) && HAS("avxvnni");
#else
    if (path == 1) return HAS("avx2") && HAS("fma");  // and so F16C, but on a virtual machine that was told to hide it
#endif
    if (path == 3) return palaver_runs(1) && HAS("avx512f") && HAS("avx512bw") && HAS("avx512vl") && HAS("avx512vnni");
    if (path == 4) return palaver_runs(3) && HAS("avx512bf16");
#elif PATHS == 2
    if (path == 1) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
    return path == 0;
}
/// The fastest.
int palaver_best_path() {
    int path = PATHS - 1;
    while (!palaver_runs(path)) path--;
#if PATHS == 5
    if (path == 4 && __builtin_cpu_is("intel")) return 3;  // products of bfloat16 take these longer than two of float32
#endif
    return path;
}

/// Pack a weight (n, k) of float32 (kind 0), bfloat16 (1) or float16 (2), all finite, whose number (i, j) stands at
/// i * stride_n + j * stride_k, in a layout above; `scales` is for int8 alone, and float16 for numbers that it has.
void palaver_pack(const void *source, int kind, int64_t stride_n, int64_t stride_k, int n, int k, void *packed, uint16_t *scales, int weights, int threads) {
    if (kind == 0) pack((const float *)source, stride_n, stride_k, n, k, packed, scales, weights, threads);
    if (kind == 1) pack((const uint16_t *)source, stride_n, stride_k, n, k, packed, scales, weights, threads);
    if (kind == 2) pack((const Half *)source, stride_n, stride_k, n, k, packed, scales, weights, threads);
}

#if PATHS == 5
#define ON(path, call) (path == 4 ? avx512bf16::call : path == 3 ? avx512vnni::call : path == 2 ? avxvnni::call : path == 1 ? avx2::call : portable::call)
#elif PATHS == 2
#define ON(path, call) (path == 1 ? dotprod::call : portable::call)
#else
#define ON(path, call) ((void)path, portable::call)
#endif
/// Write the rows' keys and values, and the logits of `wanted` rows.
void palaver_step(const Model *model, const Step *step, int path) {
    Team &all = team();
    all.run(step->threads, [&] { ON(path, run(all, *model, *step)); }, step->rows > 64);
}

/// For each row of x [rows][stride] log(sum(e^x)) of its first n numbers; NaN where one of them is not finite. A step has its
/// logits' already.
void palaver_logsumexp(const float *x, int rows, int stride, int n, double *totals, int threads, int path) {
    const auto total = [&](int i) { totals[i] = ON(path, logsumexp(x + (size_t)i * stride, n)); };
    if (rows == 1) return total(0);
    Team &all = team();
    all.run(threads, [&] { all.each(rows, 1, total); });
}

/// The `i`-th number of 64 bits of the stream `key` (splitmix64: Steele, Lea and Flood 2014, "Fast splittable pseudorandom
/// number generators").
static uint64_t noise(uint64_t key, uint64_t i) {
    uint64_t x = key + (i + 1) * 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

/// An id of x (n), of which all are finite or -infinity, and one finite; `tops` has the largest of each 32, or is null. Drawn
/// from the k (1 <= k < n) largest and all that tie with the last of them, without `banned` (-1: none); of these from the
/// likeliest that make up top_p of the sum of e^(x / temperature). sampler.py says how the seed and the position decide.
static int drawn(const Draw &draw, int path) {
    const auto [x, tops, seed, temperature, top_p, n, k, banned, position] = draw;
    struct Choice { int32_t id; double weight; };
    static thread_local std::vector<int32_t> ids;
    static thread_local std::vector<Choice> choices;
    ON(path, largest_ids(x, tops, n, k, banned, ids));
    double top = -INFINITY, total = 0, reached = 0;
    for (int32_t id : ids) top = std::max(top, (double)x[id]);
    choices.clear();
    for (int32_t id : ids) {
        choices.push_back({id, exp((x[id] - top) / temperature)});
        total += choices.back().weight;
    }
    if (top_p < 1) {
        std::stable_sort(choices.begin(), choices.end(), [](const Choice &a, const Choice &b) { return a.weight > b.weight; });
        size_t kept = 0;
        while (kept < choices.size() && reached < top_p * total) reached += choices[kept++].weight;
        choices.resize(kept);
    }
    const uint64_t key = noise(noise(seed, 0), position);
    Choice best = choices[0];
    double most = -1;
    for (const Choice &choice : choices) {
        const double speed = choice.weight / -log(((double)(noise(key, choice.id) >> 12) + 0.5) * 0x1p-52);
        if (speed > most) most = speed, best = choice;
    }
    return best.id;
}

/// One id for each of `draws`.
void palaver_draw(const Draw *draws, int count, int32_t *ids, int threads, int path) {
    const auto one = [&](int i) { ids[i] = drawn(draws[i], path); };
    if (count < 4) {  // sooner done than the others are awake
        for (int i = 0; i < count; i++) one(i);
        return;
    }
    Team &all = team();
    all.run(threads, [&] { all.each(count, 1, one); });
}
}
#else  // ------------------------------------------------------------------------------------------- once for each path

namespace { namespace PATH {
#if defined(PATH_AVX512)
constexpr int LANES = 16;  // of a register
#elif defined(PATH_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PARTS = 16 / LANES;  // sums along a row run in 16 lanes on every path, so that they agree
typedef float F __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int16_t S __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t B __attribute__((vector_size(LANES), aligned(1), may_alias));

INLINE F load(const float *p) { return *(const F *)p; }
INLINE void store(float *p, F v) { *(F *)p = v; }
/// `n` numbers, or as many as a register has; zeros beyond.
INLINE F load(const float *p, int n) {
    if (n >= LANES) return load(p);
    F v{};
    for (int i = 0; i < n; i++) v[i] = p[i];
    return v;
}
INLINE void store(float *p, F v, int n) {
    if (n >= LANES) return store(p, v);
    for (int i = 0; i < n; i++) p[i] = v[i];
}
#if defined(PATH_AVX512)  // what GCC 12 makes of the last of these takes four instructions more
INLINE F load(const uint16_t *p) { return (F)((I)_mm512_maskz_cvtepu16_epi32(-1, _mm256_loadu_si256((const __m256i *)p)) << 16); }
#elif defined(PATH_AVX2)
INLINE F load(const uint16_t *p) { return (F)((I)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)) << 16); }
#else
INLINE F load(const uint16_t *p) { return (F)(__builtin_convertvector(*(const H *)p, I) << 16); }
#endif
INLINE float one(const float *p) { return *p; }
INLINE float one(const uint16_t *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &bits, 4);
    return v;
}
/// The nearest bfloat16; NaN stays NaN.
INLINE void keep(uint16_t *p, float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    *p = v != v ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
INLINE F broadcast(float v) {  // by its bits: 0 + v would be an addition
    int32_t bits;
    memcpy(&bits, &v, 4);
    return (F)(I{} + bits);
}
/// a * b + c, rounded once
#if defined(PATH_AVX512)
INLINE F fused(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(PATH_AVX2)
INLINE F fused(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__) && defined(__linux__)
INLINE F fused(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
INLINE F fused(F a, F b, F c) { return a * b + c; }
#endif

/// Words of 32 bits with PER numbers each, and the numbers they are multiplied with: Met<W>. sum + word j . x[0 .. PER)
template <class W> struct Meets { typedef float Number; };
template <> struct Meets<uint8_t> { typedef int8_t Number; };
template <> struct Meets<int8_t> { typedef float Number; };
INLINE F words(const float *p) { return *(const F *)p; }
INLINE I words(const uint16_t *p) { return *(const I *)p; }
#if defined(PATH_AVX512)
INLINE F words(const Half *p) { return (F)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i *)p)); }
#elif defined(PATH_AVX2)
INLINE F words(const Half *p) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
#else
INLINE F words(const Half *p) {
    const I bits = __builtin_convertvector(*(const H *)p, I);
    return (F)((I)((F)((bits & 0x7FFF) << 13) * 0x1p112f) | (bits & 0x8000) << 16);
}
#endif
INLINE F plus(F sum, F word, const float *x) { return fused(word, broadcast(*x), sum); }
#if defined(PATH_BF16)
template <> struct Meets<uint16_t> { typedef uint16_t Number; };
INLINE F plus(F sum, I word, const uint16_t *x) {
    int32_t two;
    memcpy(&two, x, 4);
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)word, (__m512bh)_mm512_set1_epi32(two));
}
INLINE void put(uint16_t *to, F v) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else
INLINE F plus(F sum, I word, const float *x) {
    return fused((F)(word & -0x10000), broadcast(x[1]), fused((F)(word << 16), broadcast(x[0]), sum));
}
INLINE void put(uint16_t *to, F v) {
    for (int i = 0; i < LANES; i++) keep(to + i, v[i]);
}
#endif
template <class W> using Met = typename Meets<W>::Number;
/// The first number of each word alone.
INLINE F first(F word) { return word; }
INLINE I first(I word) { return word & 0xFFFF; }
INLINE void put(float *to, F v) { store(to, v); }

/// from, from + 1, ...
INLINE I iota(int from) {
    static const int32_t steps[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return *(const I *)steps + from;
}
INLINE int padded(int n, int step) { return (n + step - 1) / step * step; }

/// Over 16 lanes, always in the same order: halves onto halves.
INLINE float sum(const F *parts) {
    F lanes[PARTS];
    memcpy(lanes, parts, sizeof lanes);
    for (int n = PARTS / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
    for (int n = LANES / 2; n; n /= 2) lanes[0] += __builtin_shuffle(lanes[0], iota(n));
    return lanes[0][0];
}
INLINE float max(const F *parts) {
    F lanes[PARTS];
    memcpy(lanes, parts, sizeof lanes);
    for (int n = PARTS / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
    for (int n = LANES / 2; n; n /= 2) {
        const F other = __builtin_shuffle(lanes[0], iota(n));
        lanes[0] = lanes[0] > other ? lanes[0] : other;
    }
    return lanes[0][0];
}
INLINE int32_t largest(I v) {
    for (int n = LANES / 2; n; n /= 2) {
        const I other = __builtin_shuffle(v, iota(n));
        v = other > v ? other : v;
    }
    return v[0];
}
INLINE int32_t total(I v) {
    for (int n = LANES / 2; n; n /= 2) v += __builtin_shuffle(v, iota(n));
    return v[0];
}
/// e^x, relative error below 2e-7 (Cephes' polynomial); NaN stays NaN.
INLINE F exp(F x) {
    const F least = broadcast(-87.0f), most = broadcast(88.0f);
    x = least > x ? least : x;  // one instruction so, and NaN stays
    x = most < x ? most : x;
    const F shifted = fused(x, broadcast(1.44269504f), broadcast(ROUND)), n = shifted - ROUND;  // n in its lowest bits
    const F r = fused(n, broadcast(2.12194440e-4f), fused(n, broadcast(-0.693359375f), x));
    F p = broadcast(1.9875691500e-4f);
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = fused(p, r, broadcast(next));
    return (fused(p * r, r, r) + 1.0f) * (F)(((I)shifted << 23) + (127 << 23));
}
INLINE F activate(F y, int after) {
    if (after == RELU) return y < 0.0f ? broadcast(0) : y;
    if (after == TANH) return y / (exp(-1.5957691216f * (y + 0.044715f * y * y * y)) + 1.0f);  // 1 + tanh, written out
    if (after == ERF)
        for (int i = 0; i < LANES; i++) y[i] = 0.5f * y[i] * (1.0f + erff(y[i] * 0.70710678f));
    return y;
}

/// The largest of 32 numbers.
INLINE float largest(const float *x) {
    F tops[PARTS];
    for (int j = 0; j < PARTS; j++) {
        const F a = load(x + LANES * j), b = load(x + 16 + LANES * j);
        tops[j] = a > b ? a : b;
    }
    return max(tops);
}
/// Of a group's 32 logits the largest, and sum(e^(x - largest)), which is NaN where one of them is not finite.
INLINE void summarise(const float *x, float *top, float *total) {
    F totals[PARTS];
    *top = largest(x);
    for (int j = 0; j < PARTS; j++) {
        const F a = load(x + LANES * j), b = load(x + 16 + LANES * j);
        totals[j] = (exp(a - *top) + exp(b - *top)) + ((a - a) + (b - b));  // 0, or NaN
    }
    *total = sum(totals);
}
/// From these of all groups, whose number is a multiple of 16, log(sum(e^x)) of the row. Every 256 go into a double.
static double logsumexp(const float *tops, const float *totals, int groups) {
    F most[PARTS];
    for (F &some : most) some = broadcast(-3e38f);
    for (int i = 0; i < groups; i += LANES) {
        F &some = most[i / LANES % PARTS];
        some = load(tops + i) > some ? load(tops + i) : some;
    }
    const float top = max(most);
    double total = 0;
    for (int block = 0; block < groups; block += 256) {
        F parts[PARTS] = {};
        for (int i = block; i < groups && i < block + 256; i += LANES)
            parts[i / LANES % PARTS] += load(totals + i) * exp(load(tops + i) - top);
        for (const F &part : parts)
            for (int i = 0; i < LANES; i++) total += part[i];
    }
    return top + log(total);
}
/// The same from the n numbers of a row.
static double logsumexp(const float *x, int n) {
    const int groups = padded((n + 31) / 32, 16);
    std::vector<float> tops(groups, -3e38f), totals(groups);
    float last[32];  // what is left over after whole groups
    std::fill(last, last + 32, -3e38f);
    std::copy(x + n / 32 * 32, x + n, last);
    for (int i = 0; i < n; i += 32) summarise(i + 32 <= n ? x + i : last, &tops[i / 32], &totals[i / 32]);
    return logsumexp(tops.data(), totals.data(), groups);
}

/// The k-th largest of `values`, which it puts in disorder.
static float kth_largest(std::vector<float> &values, int k) {
    std::nth_element(values.begin(), values.begin() + k - 1, values.end(), std::greater<float>());
    return values[k - 1];
}
/// Ids, ascending, of the k largest but `banned` (-1: none), and of all that tie with the last of them. `tops` has the largest of
/// each 32, or is null. What is looked at is no less than the k-th of these, or of the largest of each 16 of them, where there
/// are so many: that is no larger than the k-th of all numbers, and near it.
static void largest_ids(const float *x, const float *tops, int n, int k, int banned, std::vector<int32_t> &ids) {
    const int groups = (n + 31) / 32, near = banned < 0 ? k : k + 1;
    static thread_local std::vector<float> some, own;
    static thread_local std::vector<int> looked_at;
    own.clear();
    if (!tops) {
        for (int i = 0; i < n; i += 32) own.push_back(i + 32 <= n ? largest(x + i) : *std::max_element(x + i, x + n));
        tops = own.data();
    }
    some.clear();
    for (int i = 0; i < groups; i += 16) {
        float most = tops[i];
        for (int j = i + 1; j < groups && j < i + 16; j++) most = tops[j] > most ? tops[j] : most;
        some.push_back(most);
    }
    if (near > (int)some.size()) some.assign(tops, tops + groups);
    float least = near <= (int)some.size() ? kth_largest(some, near) : -INFINITY;
    looked_at.clear();
    for (int group = 0; group < groups; group++)
        if (tops[group] >= least) {
            looked_at.push_back(group);
            for (int i = 0; i < 32; i += 16) __builtin_prefetch(x + 32 * group + i);
        }
    ids.clear();
    for (const int group : looked_at)
        for (int i = 32 * group; i < n && i < 32 * group + 32; i++)
            if (x[i] >= least && i != banned) ids.push_back(i);
    some.clear();
    for (int32_t id : ids) some.push_back(x[id]);
    least = kth_largest(some, k);
    ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int32_t id) { return x[id] < least; }), ids.end());
}

/// dot4: sum[j] += the 4 bytes of column j . x[0..3], exactly.
#if defined(PATH_AVX512) || defined(PATH_VNNI)
INLINE I dots_from(int32_t offset) { return I{} + offset; }
#else
INLINE I dots_from(int32_t) { return I{}; }  // the bytes are made signed first
#endif
#if defined(PATH_AVX512)
constexpr int ROWS = 8;  // of a tile
INLINE void dot4(I &sum, const uint8_t *w, int32_t four) {
    sum = (I)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(w), _mm512_set1_epi32(four));
}
#elif defined(PATH_VNNI)
constexpr int ROWS = 6;
INLINE void dot4(I &sum, const uint8_t *w, int32_t four) {
    sum = (I)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_loadu_si256((const __m256i *)w), _mm256_set1_epi32(four));
}
#elif defined(PATH_AVX2)
constexpr int ROWS = 6;
INLINE void dot4(I &sum, const uint8_t *w, int32_t four) {
    __m256i v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)w), _mm256_set1_epi8(-128));
    // |v| times x with v's sign: the sum of two is below 2^15
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(_mm256_set1_epi32(four), v));
    sum += (I)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(PATH_DOTPROD)
constexpr int ROWS = 6;
INLINE void dot4(I &sum, const uint8_t *w, int32_t four) {
    int8x16_t v = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w), vdupq_n_u8(128)));
    sum = (I)vdotq_s32((int32x4_t)sum, v, vreinterpretq_s8_s32(vdupq_n_s32(four)));
}
#else
constexpr int ROWS = 2;
INLINE void dot4(I &sum, const uint8_t *w, int32_t four) {
    typedef int16_t S __attribute__((vector_size(16), aligned(1), may_alias));
    S v = *(const S *)w ^ (int16_t)0x8080, x = (S)(I{} + four);
    S pairs = (v << 8 >> 8) * (x << 8 >> 8) + (v >> 8) * (x >> 8);  // below 2^15
    sum += ((I)pairs << 16 >> 16) + ((I)pairs >> 16);
}
#endif

/// sum[j] += the 2 numbers of column j . two's, int16, exactly.
INLINE void dot2(I &sum, const int8_t *w, int32_t two) {
#if defined(PATH_AVX512)
    sum = (I)_mm512_dpwssd_epi32((__m512i)sum, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w)), _mm512_set1_epi32(two));
#elif defined(PATH_VNNI)
    sum = (I)_mm256_dpwssd_avx_epi32((__m256i)sum, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)), _mm256_set1_epi32(two));
#elif defined(PATH_AVX2)
    sum += (I)_mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w)), _mm256_set1_epi32(two));
#else
    const I pairs = __builtin_convertvector(*(const H *)w, I);
    sum += (pairs << 24 >> 24) * (int16_t)two + (pairs << 16 >> 24) * (two >> 16);
#endif
}

/// 32 numbers of a row in int8, their scale, and what dots_from wants of them. All in one place: two threads that write
/// neighbouring rows share few cache lines.
struct Block { int8_t x[32]; float scale; int32_t offset; };
/// The nearest int8s to n floats (a multiple of 16), their scale and offset.
INLINE void quantise(const float *x, int n, int8_t *to, float *scale, int32_t *offset) {
    I sizes{}, totals{};  // floats above 0 compare as their bits do, infinity and NaN above all
    for (int i = 0; i < n; i += LANES) {
        const I size = (I)load(x + i) & 0x7FFFFFFF;
        sizes = size > sizes ? size : sizes;
    }
    const int32_t bits = largest(sizes);
    float most;
    memcpy(&most, &bits, 4);
    const bool finite = bits < 0x7F800000, some = finite && most > 1e-30f;
    const float inverse = some ? 127.0f / most : 0.0f;
    for (int i = 0; i < n; i += LANES) {
        I q = (I)(load(x + i) * inverse + ROUND) - ROUND_BITS;
        *(B *)(to + i) = __builtin_convertvector(q, B);
        totals += q;
    }
    *scale = some ? most / 127.0f : finite ? 0.0f : NAN;
    *offset = -128 * total(totals);
}
/// Of row `row` of `narrow`, if products read that, the 32 numbers x of block b: int8 Block [blocks][rows], bfloat16
/// [rows][blocks][32].
INLINE void narrow_block(const float *, int, int, const Step &, int, const float *) {}
INLINE void narrow_block(const float *x, int b, int blocks, const Step &s, int row, const uint16_t *) {
    for (int i = 0; i < 32; i += LANES) put((uint16_t *)s.narrow + ((size_t)row * blocks + b) * 32 + i, load(x + i));
}
INLINE void narrow_block(const float *x, int b, int, const Step &s, int row, const int8_t *) {
    const size_t at = (size_t)b * s.rows + row;
    Block &block = ((Block *)s.narrow)[at];
    quantise(x, 32, block.x, &block.scale, &block.offset);
}
/// The step whose `narrow` stands behind that of this one, which has so many blocks.
template <class W> INLINE Step behind(Step s, int blocks) {
    s.narrow = (char *)s.narrow + (size_t)s.rows * blocks * (sizeof(W) == 1 ? sizeof(Block) : 32 * sizeof(Met<W>));
    return s;
}

/// What a product reads: rows of floats, or what `narrow` has of them.
struct Rows { const float *x; int stride; };

/// What comes near while weights are multiplied, `bytes` with each block of 32 numbers of each pass: where a group is passed over
/// more than once an even share of the thread's next group, else what stands RUN_AHEAD bytes on.
struct Ahead { const char *next; int bytes; };
constexpr int RUN_AHEAD = 4096;
INLINE void fetch(const Ahead &ahead, int block, int step, int steps) {
    for (int i = 64 * step; i < ahead.bytes; i += 64 * steps) __builtin_prefetch(ahead.next + (size_t)block * ahead.bytes + i, 0, 2);
}

/// y += rows x columns `first`, first + 1, ... of a group, whose weights are at w.
template <int M, int N> INLINE void multiply(F (&y)[M][N], const Linear &l, int group, int first, const Step &s, Rows, int row, const Ahead &ahead, const uint8_t *w) {
    const uint16_t *scale = l.scale + (size_t)group * l.blocks * 32 + first;
    w += 4 * first;
    for (int b = 0; b < l.blocks; b++, w += 1024, scale += 32) {
        const size_t at = (size_t)b * s.rows + row;
        const Block *x = (const Block *)s.narrow + at;
        I dots[M][N];
        for (int m = 0; m < M; m++)
            for (int j = 0; j < N; j++) dots[m][j] = dots_from(x[m].offset);
        const auto add_four = [&](int i) __attribute__((always_inline)) {
            for (int m = 0; m < M; m++) {
                int32_t four;
                memcpy(&four, x[m].x + 4 * i, 4);
                for (int j = 0; j < N; j++) dot4(dots[m][j], w + 128 * i + 4 * LANES * j, four);
            }
        };
        if (ahead.bytes <= 64) {  // by itself, the loop is shorter by a tenth
            fetch(ahead, b, 0, 1);
            for (int i = 0; i < 8; i++) add_four(i);
        } else
            for (int i = 0; i < 8; i++) {
                fetch(ahead, b, i, 8);
                add_four(i);
            }
        for (int j = 0; j < N; j++) {
            F ws = load(scale + LANES * j);
            for (int m = 0; m < M; m++) y[m][j] = fused(__builtin_convertvector(dots[m][j], F), ws * x[m].scale, y[m][j]);
        }
    }
}
/// W is float, Half, or uint16_t for bfloat16.
template <int M, int N, class W> INLINE void multiply(F (&y)[M][N], const Linear &l, int, int first, const Step &s, Rows rows, int row, const Ahead &ahead, const W *w) {
    constexpr int RUN = 256;  // one long sum would lose more
    const int k = 32 * l.blocks, apart = ahead.bytes / 32 * PER<W>;
    const char *next = ahead.next;
    const Met<W> *x[M];
    for (int m = 0; m < M; m++) x[m] = (sizeof(Met<W>) == 4 ? (const Met<W> *)rows.x : (const Met<W> *)s.narrow) + (size_t)(row + m) * rows.stride;
    w += first * PER<W>;
    for (int from = 0; from < k; from += RUN) {
        const int to = from + RUN < k ? from + RUN : k;
        F part[M][N] = {};
        for (int i = from; i < to; i += PER<W>, w += 32 * PER<W>, next += apart) {
            __builtin_prefetch(next, 0, 2);
            if (apart > 64) __builtin_prefetch(next + 64, 0, 2);  // 128, where there is one pass
            decltype(words(w)) columns[N];
            for (int j = 0; j < N; j++) columns[j] = words(w + LANES * PER<W> * j);
            for (int m = 0; m < M; m++)
                for (int j = 0; j < N; j++) part[m][j] = plus(part[m][j], columns[j], x[m] + i);
        }
        for (int m = 0; m < M; m++)
            for (int j = 0; j < N; j++) y[m][j] += part[m][j];
    }
}
/// `M` rows from `row` on times one group of 32 columns, to where `out` is.
template <int M, class W> INLINE void tile(const Linear &l, int group, const W *w, const Step &s, Rows in, int row, Ahead &ahead, float *out, int stride, int after) {
    constexpr int AT_ONCE = M == 1 ? 32 / LANES : 2;  // registers of columns; a single row takes its weights in one run
    for (int first = 0; first < 32; first += AT_ONCE * LANES) {
        F y[M][AT_ONCE];
        for (auto &of_row : y)  // one by one: as a whole, GCC has memory cleared
            for (F &of : of_row) of = F{};
        for (int m = 0; m < M; m++)  // the other threads' until now
            for (int i = first; i < first + AT_ONCE * LANES; i += 16) __builtin_prefetch(out + (size_t)m * stride + i, 1);
        multiply(y, l, group, first, s, in, row, ahead, w);
        ahead.next += (size_t)l.blocks * ahead.bytes;
        for (int j = 0; j < AT_ONCE; j++) {
            const int column = 32 * group + first + LANES * j;
            F bias = l.bias ? load(l.bias + column) : F{};
            for (int m = 0; m < M; m++) {
                float *to = out + (size_t)m * stride + column - 32 * group;
                store(to, after == ADD ? load(to) + (y[m][j] + bias) : activate(y[m][j] + bias, after));
            }
        }
    }
}
/// The height of the first tile of so many rows: all are as high as one another, or one less.
INLINE int even(int rows, int most) {
    const int tiles = (rows + most - 1) / most;
    return tiles ? (rows + tiles - 1) / tiles : 0;
}
template <int M, class W> INLINE void rows_of(const Linear &l, int group, const W *w, const Step &s, Rows in, int row, int rows, Ahead &ahead, float *out, int stride, int after) {
    for (; even(rows - row, ROWS) == M; row += M, out += (size_t)M * stride) tile<M>(l, group, w, s, in, row, ahead, out, stride, after);
    if constexpr (M > 1) rows_of<M - 1>(l, group, w, s, in, row, rows, ahead, out, stride, after);
}
/// A group's weights, which stand near as floats where more than two tiles want them.
template <class W> INLINE void each_tile(const Linear &l, int group, const W *w, const Step &s, Rows in, int row, int rows, Ahead &ahead, float *out, int stride, int after) {
    if constexpr (std::is_same_v<W, Half>)
        if (rows - row > 2 * ROWS) {
            static thread_local std::vector<float> near;
            const size_t count = (size_t)l.blocks * 1024;
            if (near.size() < count) near.resize(count);
            for (size_t i = 0; i < count; i += LANES) store(&near[i], words(w + i));
            return rows_of<ROWS>(l, group, (const float *)near.data(), s, in, row, rows, ahead, out, stride, after);
        }
    rows_of<ROWS>(l, group, w, s, in, row, rows, ahead, out, stride, after);
}
static __attribute__((noinline)) void summarise_rows(const Step &s, int group, int row, int end, const float *x, int stride) {
    for (int groups = padded(stride / 32, 16); row < end; row++) {
        const size_t at = (size_t)row * groups + group;
        summarise(x + (size_t)row * stride + 32 * group, s.tops + at, s.sums + at);
    }
}
constexpr int HIGH = 16 * ROWS;  // rows at a time: so many stay near while the groups pass by
/// out (rows, stride) = after(in x weight + bias); an activation leaves it `behind`, if the next product reads that. All of the
/// team call it together, as all that takes a team.
template <class W> static void linear(Team &team, const Linear &l, const Step &s, Rows in, int rows, float *out, int stride, int after) {
    const int high = padded(even(rows, HIGH), ROWS);
    const int n = (rows + HIGH - 1) / HIGH * l.groups;
    team.each_then(n, team.share(l.groups), [&](int i, int then) {
        const auto weights = [&](int i) { return (const W *)l.weight + (size_t)(i % l.groups) * l.blocks * 1024; };
        const int row = i / l.groups * high, group = i % l.groups;
        const int end = row + high < rows ? row + high : rows, passes = end - row > 1 ? (end - row + ROWS - 1) / ROWS * PARTS : 1;
        const int bytes = passes == 1 || then < n ? padded(1024 * (int)sizeof(W) / passes, 64) : 0;
        Ahead ahead{passes > 1 ? (const char *)weights(then) : (const char *)weights(i) + RUN_AHEAD, bytes};
        if (sizeof(Met<W>) < 4 && (after == RELU || after == TANH || after == ERF)) {
            float x[HIGH * 32];
            each_tile(l, group, weights(i), s, in, row, end, ahead, x, 32, after);
            const Step next = behind<W>(s, l.blocks);
            for (int i = row; i < end; i++) narrow_block(x + 32 * (i - row), group, l.groups, next, i, (const Met<W> *)nullptr);
            return;
        }
        each_tile(l, group, weights(i), s, in, row, end, ahead, out + (size_t)row * stride + 32 * group, stride, after);
        if (after == LOGITS) summarise_rows(s, group, row, end, out, stride);
    });
}

/// All of a row.
template <class W> INLINE void narrow_row(const float *x, int k, const Step &s, int row) {
    for (int b = 0; b < k / 32; b++) narrow_block(x + 32 * b, b, k / 32, s, row, (const Met<W> *)nullptr);
}
template <class W> static void norm_rows(Team &team, const Norm &n, const Model &m, const Step &s) {
    const int e = m.n_embd, width = padded(e, 32);
    team.each(s.rows, team.share(s.rows), [&](int row) {
        const float *x = s.x + (size_t)row * width;
        F total[PARTS] = {}, squares[PARTS] = {};
        for (int i = 0; i < width; i += 16)
            for (int j = 0; j < PARTS; j++) total[j] += load(x + i + LANES * j);
        const float mean = sum(total) / (float)e;
        for (int i = 0; i < width; i += 16)
            for (int j = 0; j < PARTS; j++) {
                F d = iota(i + LANES * j) < e ? load(x + i + LANES * j) - mean : F{};
                squares[j] += d * d;
            }
        const float scale = 1.0f / sqrtf(sum(squares) / (float)e + m.epsilon);
        for (int b = 0; b < width / 32; b++) {
            float near[32], *out = sizeof(Met<W>) < 4 ? near : s.mixed + (size_t)row * width + 32 * b;
            for (int i = 0; i < 32; i += LANES) {
                const int at = 32 * b + i;
                store(out + i, (load(x + at) - mean) * scale * load(n.weight + at) + load(n.bias + at));
            }
            narrow_block(out, b, width / 32, s, row, (const Met<W> *)nullptr);
        }
    });
}
/// Before a product reads `x` (rows, k).
template <class W> static void ready(Team &team, const float *x, int k, const Step &s) {
    if (sizeof(Met<W>) == 4) return;
    team.each(s.rows, team.share(s.rows), [&](int row) { narrow_row<W>(x + (size_t)row * k, k, s, row); });
}

/// Number `i` of row `n` of a weight.
INLINE float unpacked(const Linear &l, int n, int i, const uint8_t *w) {
    const size_t block = (size_t)(n / 32) * l.blocks + i / 32;
    return (float)(w[block * 1024 + i % 32 / 4 * 128 + n % 32 * 4 + i % 4] - 128) * one(l.scale + block * 32 + n % 32);
}
template <class W> INLINE float unpacked(const Linear &l, int n, int i, const W *w) {
    return one(w + ((size_t)(n / 32) * l.blocks * 32 + i / PER<W> * PER<W>) * 32 + n % 32 * PER<W> + i % PER<W>);
}
/// x = wte[id] + wpe[position]; the embedding is read back from its packed form.
template <class W> static void embed(Team &team, const Model &m, const Step &s) {
    const int e = m.n_embd, width = padded(e, 32);
    team.each(s.rows, team.share(s.rows), [&](int row) {
        for (int i = 0; i < width; i++) {
            float position = i < e ? m.wpe[(size_t)s.positions[row] * e + i] : 0.0f;
            s.x[(size_t)row * width + i] = unpacked(m.wte, s.ids[row], i, (const W *)m.wte.weight) + position;
        }
    });
}

/// One head of a sequence. `keys_at`: how far behind its query a row's key stands, and its value behind that. A query has
/// `room` floats of scratch, for its scores and then its weights; behind all queries' stand they themselves as they are
/// multiplied, `width` floats for each.
template <class K> struct Head {
    const float *qkv; void *const *pages; size_t plane, planes; float *out, *scratch;
    int stride, keys_at, dim, width, deep, out_stride, room; float scale;
    /// From position t on, up to the end of its page.
    __attribute__((always_inline)) K *keys(int t) const { return (K *)pages[t / PAGE] + plane + (size_t)(t % PAGE) * deep; }
    __attribute__((always_inline)) K *values(int t) const { return keys(t) + planes; }
};

/// In int8, of a tile of keys or values.
INLINE float *scales(const Head<int8_t> &h, int8_t *tile) { return (float *)(tile + 16 * h.width); }
/// Where the first block of query q is.
INLINE Block *blocks(const Head<int8_t> &h, int q) { return (Block *)(h.scratch + QUERIES * h.room) + q * h.width / 32; }
/// A head's numbers with zeros behind them, in the place of query q.
INLINE float *whole(const Head<int8_t> &h, const float *x, int q) {
    float *to = h.scratch + QUERIES * h.room + q * h.width;
    for (int d = 0; d < h.width; d += LANES) store(to + d, load(x + d, h.dim - d));
    return to;
}

/// Keep the key and the value of position p, whose query is at `row`.
template <class K> INLINE void keep_row(const Head<K> &h, const float *row, int p) {
    K *key = (K *)(h.scratch + QUERIES * h.room), *value = key + h.width;
    for (int d = 0; d < h.dim; d += LANES) {
        put(key + d, load(row + h.keys_at + d, h.dim - d));
        put(value + d, load(row + 2 * h.keys_at + d, h.dim - d));
    }
    K *to = h.keys(p / 16 * 16) + p % 16 * PER<K>;
    for (int d = 0; d < h.dim; d += PER<K>) memcpy(to + 16 * d, key + d, sizeof(K) * PER<K>);
    to = h.values(p / PER<K> * PER<K>) + p % PER<K>;
    for (int d = 0; d < h.dim; d++) to[d * PER<K>] = value[d];
}
INLINE void keep_row(const Head<int8_t> &h, const float *row, int p) {
    const int t = p / 16 * 16, at = p % 16;
    int32_t unused;
    float *key = whole(h, row + h.keys_at, 0);
    int8_t *tile = h.keys(t), *to = tile + 4 * at, *near = (int8_t *)key;  // in the floats' own place
    for (int d = 0; d < h.width; d += 4) {
        if (d % 32 == 0) quantise(key + d, 32, near + d, scales(h, tile) + d / 2 + at, &unused);
        int32_t four;
        memcpy(&four, near + d, 4);
        four ^= 0x80808080;
        memcpy(to + 16 * d, &four, 4);
    }
    float *value = whole(h, row + 2 * h.keys_at, 0);
    tile = h.values(t);
    quantise(value, h.width, near, scales(h, tile) + at, &unused);
    to = tile + at / 2 * 2 * h.width;
    for (int d = 0; d < h.width; d += LANES) {
        const S own = __builtin_convertvector(*(B *)(near + d), S);
        S &pairs = *(S *)(to + 2 * d);
        pairs = at % 2 ? (pairs & 0xFF) | own << 8 : (pairs & -0x100) | (own & 0xFF);
    }
}

template <int Q, class K> INLINE void prepare(const Head<K> &h, int row) {
    for (int q = 0; q < Q; q++)
        for (int d = 0; d < h.width; d += LANES)
            put((Met<K> *)(h.scratch + QUERIES * h.room) + q * h.width + d, load(h.qkv + (size_t)(row + q) * h.stride + d, h.dim - d));
}
template <int Q> INLINE void prepare(const Head<int8_t> &h, int row) {
    for (int q = 0; q < Q; q++) {
        const float *query = whole(h, h.qkv + (size_t)(row + q) * h.stride, QUERIES - 1);  // blocks do not reach so far
        for (int b = 0; b < h.width / 32; b++) {
            Block &block = blocks(h, q)[b];
            quantise(query + 32 * b, 32, block.x, &block.scale, &block.offset);
        }
    }
}

/// Sums at a time that do not wait for each other, of one query or of several.
template <int Q> constexpr int APART = LANES == 16 || Q == 1 ? 4 : 1;

/// `Q` queries . 16 * T keys from t on.
template <int Q, int T, class K> INLINE void dots(const Head<K> &h, int t, F (&sums)[T][Q][PARTS]) {
    const Met<K> *queries = (const Met<K> *)(h.scratch + QUERIES * h.room);
    const K *tiles = h.keys(t);
    for (int d = 0; d < h.dim; d += PER<K>)
        for (int i = 0; i < T; i++)
            for (int j = 0; j < PARTS; j++) {
                const auto keys = words(tiles + (size_t)16 * i * h.width + 16 * d + LANES * PER<K> * j);
                for (int q = 0; q < Q; q++) sums[i][q][j] = plus(sums[i][q][j], keys, queries + q * h.width + d);
            }
}
template <int Q, int T> INLINE void dots(const Head<int8_t> &h, int t, F (&sums)[T][Q][PARTS]) {
    int8_t *tiles = h.keys(t);
    for (int b = 0; 32 * b < h.width; b++) {
        I of_block[T][Q][PARTS];
        for (int i = 0; i < T; i++)
            for (int q = 0; q < Q; q++)
                for (I &of : of_block[i][q]) of = dots_from(blocks(h, q)[b].offset);
        for (int d = 0; d < 32; d += 4)
            for (int q = 0; q < Q; q++) {
                int32_t four;
                memcpy(&four, blocks(h, q)[b].x + d, 4);
                for (int i = 0; i < T; i++)
                    for (int j = 0; j < PARTS; j++)
                        dot4(of_block[i][q][j], (const uint8_t *)tiles + (size_t)16 * i * h.deep + 16 * (32 * b + d) + 4 * LANES * j, four);
            }
        for (int i = 0; i < T; i++)
            for (int j = 0; j < PARTS; j++) {
                const F scale = load(scales(h, tiles + (size_t)16 * i * h.deep) + 16 * b + LANES * j);
                for (int q = 0; q < Q; q++) sums[i][q][j] = fused(__builtin_convertvector(of_block[i][q][j], F), scale * blocks(h, q)[b].scale, sums[i][q][j]);
            }
    }
}
/// Scores of `Q` queries, the first at `position`, for 16 * T keys from t on; `best` is the highest of each.
template <int Q, int T, class K> INLINE void score(const Head<K> &h, int position, int t, F (&best)[Q][PARTS]) {
    F sums[T][Q][PARTS] = {};
    dots<Q, T>(h, t, sums);
    for (int i = 0; i < T; i++)
        for (int q = 0; q < Q; q++)
            for (int j = 0; j < PARTS; j++) {
                const int at = t + 16 * i + LANES * j;
                F score = iota(at) <= position + q ? sums[i][q][j] * h.scale : broadcast(-INFINITY);
                store(h.scratch + q * h.room + at, score);
                best[q][j] = score > best[q][j] ? score : best[q][j];
            }
}

/// Keep weights for the keys from t on, in int8 each times its value's scale; `top` is the largest of them, and `bad` is 0, or NaN
/// where one is.
template <class K> INLINE void keep_weights(const Head<K> &, float *weights, int, int t, F weight, F &, F &) {
    put((Met<K> *)weights + t, weight);  // it may be half as wide as its score, whose place it takes
}
INLINE void keep_weights(const Head<int8_t> &h, float *weights, int position, int t, F weight, F &top, F &bad) {
    weight *= load(scales(h, h.values(t / 16 * 16)) + t % 16);
    weight = iota(t) <= position ? weight : F{};
    store(weights + t, weight);
    top = weight > top ? weight : top;
    bad += weight - weight;
}
/// Weights of floats are blended as they are.
template <class K> INLINE float narrow_weights(const Head<K> &, float *, int, int, const F *, const F *) { return 1; }
/// The weights of a query at `position` as int16 behind themselves, zeros up to `end`; what 1 of them is. So large that no sum of
/// so many is too much for 32 bits.
INLINE float narrow_weights(const Head<int8_t> &h, float *weights, int position, int end, const F *tops, const F *bad) {
    const int most = 0x7FFFFFFF / 127 / (position + 1), unit = most < 0x7FFF ? most : 0x7FFF;
    const float top = max(tops), inverse = top > 1e-30f ? (float)unit / top : 0.0f;
    for (int t = 0; t < end; t += LANES)
        *(S *)((int16_t *)(weights + h.room / 2) + t) = __builtin_convertvector((I)(load(weights + t) * inverse + ROUND) - ROUND_BITS, S);
    return top / (float)unit + sum(bad);
}
template <int Q, int D, class K> INLINE void finish(const Head<K> &h, const F (&mixed)[Q][D][PARTS], int row, int d, const float (&scale)[Q]) {
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < D; i++)
            for (int j = 0; j < PARTS; j++) {
                const int at = d + 16 * i + LANES * j;
                store(h.out + (size_t)(row + q) * h.out_stride + at, mixed[q][i][j] * scale[q], h.dim - at);
            }
}
/// 16 * D numbers from `d` on of the values, each times its weight, for queries of which the first is at `position`.
template <int Q, int D, class K> INLINE void blend(const Head<K> &h, int position, int row, int d, const float (&scale)[Q]) {
    F mixed[Q][D][PARTS] = {};
    const Met<K> *x[Q];
    for (int q = 0; q < Q; q++) x[q] = (const Met<K> *)(h.scratch + q * h.room);
    const int all_see = (position + 1) / PER<K> * PER<K>;
    for (int page = 0; page < all_see; page += PAGE) {
        const K *values = h.values(page) + d * PER<K>;
        for (int p = page; p < all_see && p < page + PAGE; p += PER<K>, values += PER<K> * h.width)
            for (int i = 0; i < D; i++)
                for (int j = 0; j < PARTS; j++) {
                    const auto value = words(values + (16 * i + LANES * j) * PER<K>);
                    for (int q = 0; q < Q; q++) mixed[q][i][j] = plus(mixed[q][i][j], value, x[q] + p);
                }
    }
    for (int q = 0; q < Q; q++)  // what is left, up to its own: 0 times a value that is not finite would be NaN
        for (int own = all_see; own <= position + q; own += PER<K>)
            for (int i = 0; i < D; i++)
                for (int j = 0; j < PARTS; j++) {
                    auto value = words(h.values(own) + (d + 16 * i + LANES * j) * PER<K>);
                    if (own == position + q) value = first(value);
                    mixed[q][i][j] = plus(mixed[q][i][j], value, x[q] + own);
                }
    finish<Q, D>(h, mixed, row, d, scale);
}
template <int Q, int D> INLINE void blend(const Head<int8_t> &h, int position, int row, int d, const float (&scale)[Q]) {
    I sums[Q][D][PARTS] = {};
    for (int t = 0; t < position + Q; t += 16) {
        const int8_t *pair = h.values(t) + 2 * d;
        for (int p = 0; p < 16 && t + p < position + Q; p += 2, pair += 2 * h.width) {
            for (int q = 0; q < Q; q++) {
                int32_t two;
                memcpy(&two, (const int16_t *)(h.scratch + q * h.room + h.room / 2) + t + p, 4);
                for (int i = 0; i < D; i++)
                    for (int j = 0; j < PARTS; j++) dot2(sums[q][i][j], pair + 2 * (16 * i + LANES * j), two);
            }
        }
    }
    F mixed[Q][D][PARTS];
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < D; i++)
            for (int j = 0; j < PARTS; j++) mixed[q][i][j] = __builtin_convertvector(sums[q][i][j], F);
    finish<Q, D>(h, mixed, row, d, scale);
}
/// `Q` queries of one head, the first at `position` and row `row` of the span; each sees the keys up to its own.
template <int Q, class K> static __attribute__((noinline)) void attend(const Head<K> &h, int position, int row) {
    constexpr int D = APART<Q>, T = sizeof(K) == 1 && D * Q > 8 ? 2 : D;
    const int end = padded(position + Q, 16);
    prepare<Q>(h, row);
    F best[Q][PARTS];
    float scale[Q];
    for (int q = 0; q < Q; q++)
        for (int j = 0; j < PARTS; j++) best[q][j] = broadcast(-INFINITY);
    int t = 0;
    for (; t + 16 * T <= end; t += 16 * T) score<Q, T>(h, position, t, best);
    for (; t < end; t += 16) score<Q, 1>(h, position, t, best);
    for (int q = 0; q < Q; q++) {
        const float top = max(best[q]);
        float *weights = h.scratch + q * h.room;
        F total[PARTS] = {}, tops[PARTS] = {}, bad[PARTS] = {};
        for (t = 0; t < end; t += LANES) {
            const int j = t / LANES % PARTS;
            F weight = exp(load(weights + t) - top);
            weight = iota(t) <= position + q ? weight : F{};
            total[j] += weight;
            keep_weights(h, weights, position + q, t, weight, tops[j], bad[j]);
        }
        scale[q] = narrow_weights(h, weights, position + q, end, tops, bad) / sum(total);
    }
    int d = 0;
    for (; d + 16 * D <= h.width; d += 16 * D) blend<Q, D>(h, position, row, d, scale);
    for (; d < h.width; d += 16) blend<Q, 1>(h, position, row, d, scale);
}
/// A head's query, key and value of a row.
template <class K> INLINE void fetch(const Head<K> &h, const float *row) {
    for (int j = 0; j < 3; j++)
        for (int d = 0; d < h.dim; d += 16) __builtin_prefetch(row + j * h.keys_at + d);
}
/// The numbers, not the scales, that a head of a sequence reads first, and what it writes to, at position p.
template <class K> INLINE void fetch(const Head<K> &h, int p) {
    const size_t tile = sizeof(K) * 16 * h.deep;
    fetch(h, h.qkv);
    for (const auto &[first, last] : {std::pair(h.keys(0), h.keys(p / 16 * 16)), std::pair(h.values(0), h.values(p / 16 * 16))})
        for (size_t i = 0; i < tile && i < 1024; i += 64) {
            __builtin_prefetch((const char *)first + i);
            __builtin_prefetch((const char *)last + i, 1);
        }
}
/// Write keys and values of every sequence, then attend, in the last layer for `wanted` rows alone; a head of a sequence is
/// one thread's.
template <class K> static void attention(Team &team, const Model &m, const Step &s, int layer) {
    const int e = m.n_embd, dim = e / m.n_head, width = padded(dim, 32), room = 2 * padded(m.n_positions, 16);
    const int deep = sizeof(K) == 1 ? width + width / 8 : width;
    const int stride = padded(3 * e, 32), out_stride = padded(e, 32);
    float *scratch = s.scratch + (size_t)team.number * QUERIES * (room + width);
    const auto head_of = [&](int i) {
        const int head = i % m.n_head;
        const Span &span = s.spans[i / m.n_head];
        const size_t plane = ((size_t)layer * 2 * m.n_head + head) * PAGE * deep, planes = (size_t)m.n_head * PAGE * deep;
        const float *qkv = s.wide + (size_t)span.row * stride + head * dim;
        float *out = s.mixed + (size_t)span.row * out_stride + head * dim;
        return Head<K>{qkv, span.pages, plane, planes, out, scratch, stride, e, dim, width, deep, out_stride, room, m.layers[layer].attention_scale};
    };
    const int n = s.n_spans * m.n_head;
    team.each_then(n, 1, [&](int i, int then) {
        if (then < n) fetch(head_of(then), s.spans[then / m.n_head].start);
        const Span &span = s.spans[i / m.n_head];
        const Head<K> h = head_of(i);
        for (int r = 0; r < span.count; r++) {
            fetch(h, h.qkv + (size_t)(r + 8) * stride);
            keep_row(h, h.qkv + (size_t)r * stride, span.start + r);
        }
        if (layer + 1 < m.n_layer) {
            int r = 0;
            for (; r + QUERIES <= span.count; r += QUERIES) attend<QUERIES>(h, span.start + r, r);
            for (; r < span.count; r++) attend<1>(h, span.start + r, r);
            return;
        }
        for (int w = 0; w < s.n_wanted; w++)
            if (const int i = s.wanted[w] - span.row; 0 <= i && i < span.count) attend<1>(h, span.start + i, i);
    });
}

/// Nobody reads the last layer's other rows: `wanted` ones come together at the top, by way of `wide`.
static void gather(Team &team, const Step &s, int width) {
    team.each(1, 1, [&](int) {
        for (float *x : {s.x, s.mixed}) {
            for (int i = 0; i < s.n_wanted; i++) memcpy(s.wide + (size_t)i * width, x + (size_t)s.wanted[i] * width, sizeof(float) * width);
            memcpy(x, s.wide, sizeof(float) * width * s.n_wanted);
        }
    });
}
/// W: weights as they are kept, K: keys and values.
template <class W, class K> static void forward(Team &team, const Model &m, const Step &all) {
    const int width = padded(m.n_embd, 32);
    const Rows mixed{all.mixed, width};
    Step wanted = all;
    wanted.rows = all.n_wanted;
    embed<W>(team, m, all);
    for (int i = 0; i < m.n_layer; i++) {
        const Layer &h = m.layers[i];
        const int wide = 32 * h.c_fc.groups;
        norm_rows<W>(team, h.ln_1, m, all);
        linear<W>(team, h.c_attn, all, mixed, all.rows, all.wide, 32 * h.c_attn.groups, STORE);
        attention<K>(team, m, all, i);
        if (i + 1 == m.n_layer) gather(team, all, width);
        const Step &s = i + 1 == m.n_layer ? wanted : all;
        ready<W>(team, s.mixed, width, s);
        linear<W>(team, h.attn_c_proj, s, mixed, s.rows, s.x, width, ADD);
        norm_rows<W>(team, h.ln_2, m, s);
        linear<W>(team, h.c_fc, s, mixed, s.rows, s.wide, wide, m.activation);
        linear<W>(team, h.mlp_c_proj, behind<W>(s, h.c_fc.blocks), Rows{s.wide, wide}, s.rows, s.x, width, ADD);
    }
    norm_rows<W>(team, m.ln_f, m, wanted);
    linear<W>(team, m.lm_head, wanted, mixed, wanted.rows, wanted.logits, 32 * m.lm_head.groups, LOGITS);
    const int groups = padded(m.lm_head.groups, 16);
    team.each(wanted.rows, 1, [&](int i) {
        wanted.totals[i] = logsumexp(wanted.tops + (size_t)i * groups, wanted.sums + (size_t)i * groups, groups);
    });
}
static void run(Team &team, const Model &m, const Step &s) {
#if defined(PATH_INT8)  // it has instructions of its own for these weights alone
    if (m.weights != INT8) return avx2::run(team, m, s);
#elif defined(PATH_BF16)
    if (m.weights != BFLOAT16 || m.keys == FLOAT32) return avx512vnni::run(team, m, s);
    forward<uint16_t, uint16_t>(team, m, s);
#else
    if (m.weights == FLOAT32) return forward<float, float>(team, m, s);
    if (m.weights == FLOAT16) return forward<Half, float>(team, m, s);
    if (m.weights == BFLOAT16) return m.keys == FLOAT32 ? forward<uint16_t, float>(team, m, s) : forward<uint16_t, uint16_t>(team, m, s);
#endif
#if !defined(PATH_BF16)
    if (m.keys == INT8) return forward<uint8_t, int8_t>(team, m, s);
    m.keys == FLOAT32 ? forward<uint8_t, float>(team, m, s) : forward<uint8_t, uint16_t>(team, m, s);
#endif
}
}}  // namespace
#endif
