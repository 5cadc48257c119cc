// One step of GPT-2 on a CPU: rows of many sequences side by side, weights and activations int8 in blocks of 32.
//
// A row's numbers are the same bits alone, in any batch, with its prompt cut anyhow, on any number of threads and on
// every path below: integers add up exactly, and floats are added lane by lane in an order that only the row's own
// position decides (no fused multiply-add: build with -ffp-contract=off). What is not finite stays so: a block with
// such a number gets the scale NaN, and so do all logits of its row, and of its row alone.
//
// Layouts, all padded with zeros:
//   weight   [n / 32][k / 32][8][32 columns][4]  w + 128 as uint8: a group of 32 columns is read in one run
//   scale    [n / 32][k / 32][32 columns]        bfloat16, w = (byte - 128) * scale
//   kv       [layer][2][head][capacity][width]   bfloat16; width is head_dim rounded up to 16; keys stand transposed in
//                                                tiles of 16 positions ([capacity / 16][width][16]), values plainly
//
// The lower half of the file is compiled once for each path, by including itself; `PATH` names the path.
#ifndef PATH
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

extern "C" {
struct Linear { const uint8_t *weight; const uint16_t *scale; const float *bias; int32_t blocks, groups; };
struct Norm { const float *weight, *bias; };
struct Layer { Norm ln_1, ln_2; Linear c_attn, attn_c_proj, c_fc, mlp_c_proj; float attention_scale; };
struct Model {
    const Layer *layers; Linear wte, lm_head; const float *wpe; Norm ln_f;
    int32_t n_layer, n_head, n_embd, n_positions, activation; float epsilon;
};
struct Span { uint16_t *kv; int32_t capacity, start, count, row; };  // `count` rows of a sequence, from `row` of the batch
struct Step {
    const Span *spans; const int32_t *ids, *positions, *wanted; int32_t n_spans, rows, n_wanted, threads;
    float *x, *wide, *mixed, *scores, *logits;              // rows x e, rows x wide, rows x e, threads x 4 x positions
    int8_t *quants; float *scales; int32_t *offsets;        // rows x wide; and for each block of 32 of it
};
}

namespace {
typedef float F16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int8_t B16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef uint16_t H16 __attribute__((vector_size(32), aligned(2), may_alias));
enum After { STORE, ADD, RELU, TANH, ERF };
constexpr int QUERIES = 4;
}
#define INLINE static inline __attribute__((always_inline))

#define PATH portable
#include "step.cpp"
#undef PATH
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PATHS 3
#pragma GCC push_options
#pragma GCC target("avx2")
#define PATH avx2
#define PATH_AVX2
#include "step.cpp"
#undef PATH
#undef PATH_AVX2
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#define PATH avx512vnni
#define PATH_AVX512
#include "step.cpp"
#undef PATH
#pragma GCC pop_options
#else
#define PATHS 1
#endif

extern "C" {
/// Which version of the structures and layouts this is.
int palaver_layout() { return 1; }

/// The fastest path this CPU can take: 0 portable, 1 AVX2, 2 AVX512-VNNI. All lower ones run too.
int palaver_best_path() {
#if PATHS > 1
    __builtin_cpu_init();
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (wide && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

/// Write the rows' keys and values, and the logits of `wanted` rows. `path` is at most palaver_best_path().
void palaver_step(const Model *model, const Step *step, int path) {
#if PATHS > 1
    if (path == 2) return avx512vnni::forward(*model, *step);
    if (path == 1) return avx2::forward(*model, *step);
#endif
    (void)path;
    portable::forward(*model, *step);
}
}
#else  // ------------------------------------------------------------------------------------------- once for each path

namespace { namespace PATH {
INLINE F16 load(const float *p) { return *(const F16 *)p; }
INLINE void store(float *p, F16 v) { *(F16 *)p = v; }
INLINE F16 bfloat(const uint16_t *p) { return (F16)(__builtin_convertvector(*(const H16 *)p, I16) << 16); }
/// The nearest bfloat16; NaN stays NaN.
INLINE uint16_t rounded(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return v != v ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
INLINE F16 all(float v) { return F16{} + v; }
INLINE I16 lanes() { return I16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE int padded(int n, int step) { return (n + step - 1) / step * step; }

INLINE float sum(F16 v) {
    float a[16], b[8];
    memcpy(a, &v, sizeof a);
    for (int i = 0; i < 8; i++) b[i] = a[i] + a[i + 8];
    for (int i = 0; i < 4; i++) b[i] += b[i + 4];
    return (b[0] + b[2]) + (b[1] + b[3]);
}
INLINE float max(F16 v) {
    float a[16];
    memcpy(a, &v, sizeof a);
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
    return a[0];
}
/// e^x, relative error below 2e-7 (Cephes' polynomial); NaN stays NaN.
INLINE F16 exp(F16 x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    F16 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    F16 p = ((((r * 1.9875691500e-4f + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
             1.6666665459e-1f) * r + 5.0000001201e-1f;
    I16 power = (__builtin_convertvector(n, I16) + 127) << 23;
    return (p * r * r + r + 1.0f) * (F16)power;
}
INLINE F16 activate(F16 y, int after) {
    if (after == RELU) return y < 0.0f ? all(0) : y;
    if (after == TANH) return y / (exp(-1.5957691216f * (y + 0.044715f * y * y * y)) + 1.0f);  // 1 + tanh, written out
    if (after == ERF)
        for (int i = 0; i < 16; i++) y[i] = 0.5f * y[i] * (1.0f + erff(y[i] * 0.70710678f));
    return y;
}

/// 16 sums of integers, as the path likes to keep them; dot4: sum[j] += 4 bytes of column j (unsigned) . x[0..3], exactly.
#if defined(PATH_AVX512)
typedef I16 Dots;
constexpr int ROWS = 5;  // of a tile: what the registers hold
INLINE Dots dots_from(int32_t offset) { return I16{} + offset; }
INLINE F16 floats(const Dots &d) { return __builtin_convertvector(d, F16); }
INLINE void dot4(Dots &sum, const uint8_t *w, int32_t four) {
    sum = (I16)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(w), _mm512_set1_epi32(four));
}
#elif defined(PATH_AVX2)
struct Dots { __m256i half[2]; };
constexpr int ROWS = 2;
INLINE Dots dots_from(int32_t offset) { return {{_mm256_set1_epi32(offset), _mm256_set1_epi32(offset)}}; }
INLINE F16 floats(const Dots &d) {
    float y[16];
    for (int i = 0; i < 2; i++) _mm256_storeu_ps(y + 8 * i, _mm256_cvtepi32_ps(d.half[i]));
    return load(y);
}
INLINE void dot4(Dots &sum, const uint8_t *w, int32_t four) {
    __m256i both = _mm256_set1_epi32(four), odd = _mm256_srai_epi16(both, 8);
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8);
    for (int i = 0; i < 2; i++) {  // as 16 bits: bytes times bytes would saturate
        __m256i v = _mm256_loadu_si256((const __m256i *)(w + 32 * i));
        __m256i low = _mm256_and_si256(v, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(v, 8);
        __m256i four_dots = _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd));
        sum.half[i] = _mm256_add_epi32(sum.half[i], four_dots);
    }
}
#else
struct Dots { int32_t v[16]; };
constexpr int ROWS = 1;
INLINE Dots dots_from(int32_t offset) {
    Dots d;
    for (int j = 0; j < 16; j++) d.v[j] = offset;
    return d;
}
INLINE F16 floats(const Dots &d) { return __builtin_convertvector(*(const I16 *)d.v, F16); }
INLINE void dot4(Dots &sum, const uint8_t *w, int32_t four) {
    for (int t = 0; t < 4; t++) {
        const int32_t x = (int8_t)(four >> (8 * t));
        for (int j = 0; j < 16; j++) sum.v[j] += x * w[4 * j + t];
    }
}
#endif

/// `M` rows from `row` on times one group of 32 columns.
template <int M> INLINE void tile(const Linear &l, int group, const Step &s, int row, int rows, float *out, int stride, int after) {
    const uint8_t *w = l.weight + (size_t)group * l.blocks * 1024;
    const uint16_t *scale = l.scale + (size_t)group * l.blocks * 32;
    const size_t ahead = row + M == rows ? (size_t)l.blocks * 1024 : 0;  // the next group, while this one computes
    F16 y[M][2] = {};
    for (int b = 0; b < l.blocks; b++, w += 1024, scale += 32) {
        const size_t at = (size_t)b * s.rows + row;
        const int8_t *x = s.quants + 32 * at;
        Dots dots[M][2];
        for (int m = 0; m < M; m++) dots[m][0] = dots[m][1] = dots_from(s.offsets[at + m]);
        for (int i = 0; i < 8; i++, x += 4) {
            if (ahead) __builtin_prefetch(w + ahead + 128 * i), __builtin_prefetch(w + ahead + 128 * i + 64);
            for (int m = 0; m < M; m++) {
                int32_t four;
                memcpy(&four, x + 32 * m, 4);
                for (int j = 0; j < 2; j++) dot4(dots[m][j], w + 128 * i + 64 * j, four);
            }
        }
        for (int j = 0; j < 2; j++) {
            F16 ws = bfloat(scale + 16 * j);
            for (int m = 0; m < M; m++)
                y[m][j] += floats(dots[m][j]) * (ws * s.scales[at + m]);
        }
    }
    for (int j = 0; j < 2; j++) {
        const int column = 32 * group + 16 * j;
        F16 bias = l.bias ? load(l.bias + column) : F16{};
        for (int m = 0; m < M; m++) {
            float *to = out + (size_t)(row + m) * stride + column;
            store(to, after == ADD ? load(to) + (y[m][j] + bias) : activate(y[m][j] + bias, after));
        }
    }
}
template <int M> INLINE void rows_of(const Linear &l, int group, const Step &s, int row, int rows, float *out, int stride, int after) {
    for (; row + M <= rows; row += M) tile<M>(l, group, s, row, rows, out, stride, after);
    if constexpr (M > 1) rows_of<M - 1>(l, group, s, row, rows, out, stride, after);
}
/// out (rows, stride) = after(quants x weight + bias). All threads of the team call it together, as all `omp for` below.
static void linear(const Linear &l, const Step &s, int rows, float *out, int stride, int after) {
    int chunk = l.groups / (8 * s.threads) + 1;
#pragma omp for schedule(dynamic, chunk)
    for (int group = 0; group < l.groups; group++) rows_of<ROWS>(l, group, s, 0, rows, out, stride, after);
}

/// Row `row` of `quants` [k / 32][rows][32], `scales` and `offsets` [k / 32][rows] from k floats (a multiple of 32).
INLINE void quantise(const float *x, int k, const Step &s, int row) {
    for (int b = 0; b < k / 32; b++) {
        F16 u = load(x + 32 * b), v = load(x + 32 * b + 16), a = u < 0.0f ? -u : u, c = v < 0.0f ? -v : v;
        float most = max(a > c ? a : c), bad = sum(u * 0.0f + v * 0.0f);  // NaN when a number is not finite
        float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
        I16 p = (I16)(u * inverse + 12582912.0f) - 0x4B400000, q = (I16)(v * inverse + 12582912.0f) - 0x4B400000;
        const size_t at = (size_t)b * s.rows + row;
        *(B16 *)(s.quants + at * 32) = __builtin_convertvector(p, B16);
        *(B16 *)(s.quants + at * 32 + 16) = __builtin_convertvector(q, B16);
        s.scales[at] = most > 1e-30f ? most / 127.0f + bad : bad;
        s.offsets[at] = -128 * (int32_t)sum(__builtin_convertvector(p + q, F16));
    }
}
INLINE void norm(const float *x, const Norm &n, const Model &m, float *out) {
    const int e = m.n_embd, width = padded(e, 32);
    F16 total{}, squares{};
    for (int i = 0; i < width; i += 16) total += load(x + i);
    float mean = sum(total) / (float)e;
    for (int i = 0; i < width; i += 16) {
        F16 d = lanes() + i < e ? load(x + i) - mean : F16{};
        squares += d * d;
    }
    float scale = 1.0f / sqrtf(sum(squares) / (float)e + m.epsilon);
    for (int i = 0; i < width; i += 16) store(out + i, (load(x + i) - mean) * scale * load(n.weight + i) + load(n.bias + i));
}
static void norm_and_quantise(const Norm &n, const Model &m, const Step &s) {
    const int width = padded(m.n_embd, 32);
#pragma omp for
    for (int row = 0; row < s.rows; row++) {
        float *out = s.mixed + (size_t)row * width;
        norm(s.x + (size_t)row * width, n, m, out);
        quantise(out, width, s, row);
    }
}
static void quantise_rows(const float *x, int k, const Step &s) {
#pragma omp for
    for (int row = 0; row < s.rows; row++) quantise(x + (size_t)row * k, k, s, row);
}

/// x = wte[id] + wpe[position]; the embedding is read back from its packed form.
static void embed(const Model &m, const Step &s) {
    const int e = m.n_embd, width = padded(e, 32), blocks = m.wte.blocks;
#pragma omp for
    for (int row = 0; row < s.rows; row++) {
        const int group = s.ids[row] / 32, lane = s.ids[row] % 32;
        for (int i = 0; i < width; i++) {
            const size_t block = (size_t)group * blocks + i / 32;
            uint32_t bits = (uint32_t)m.wte.scale[block * 32 + lane] << 16;
            float scale, position = i < e ? m.wpe[(size_t)s.positions[row] * e + i] : 0.0f;
            memcpy(&scale, &bits, 4);
            int byte = m.wte.weight[block * 1024 + i % 32 / 4 * 128 + lane * 4 + i % 4];
            s.x[(size_t)row * width + i] = (float)(byte - 128) * scale + position;
        }
    }
}

struct Head { const float *qkv; const uint16_t *keys, *values; float *out, *scores; int stride, dim, width, out_stride; float scale; };

/// `Q` queries of one head, the first at `position` and row `row` of the span; each sees the keys up to its own.
template <int Q> INLINE void attend(const Head &h, int position, int row, int room) {
    const int last = position + Q - 1, end = padded(last + 1, 16);
    float top[Q];
    for (int q = 0; q < Q; q++) top[q] = -INFINITY;
    for (int t = 0; t < end; t += 16) {
        F16 dots[Q] = {};
        for (int d = 0; d < h.dim; d++) {
            F16 key = bfloat(h.keys + (size_t)t * h.width + 16 * d);
            for (int q = 0; q < Q; q++) dots[q] += key * h.qkv[(size_t)(row + q) * h.stride + d];
        }
        for (int q = 0; q < Q; q++) {
            F16 score = lanes() + t <= position + q ? dots[q] * h.scale : all(-INFINITY);
            store(h.scores + q * room + t, score);
            float most = max(score);
            top[q] = most > top[q] || most != most ? most : top[q];
        }
    }
    float total[Q];
    for (int q = 0; q < Q; q++) {
        F16 parts{};
        for (int t = 0; t < end; t += 16) {
            F16 weight = exp(load(h.scores + q * room + t) - top[q]);
            weight = lanes() + t <= position + q ? weight : F16{};
            store(h.scores + q * room + t, weight);
            parts += weight;
        }
        total[q] = 1.0f / sum(parts);
    }
    for (int d = 0; d < h.width; d += 16) {
        F16 mixed[Q] = {};
        for (int p = 0; p <= position; p++) {
            F16 value = bfloat(h.values + (size_t)p * h.width + d);
            for (int q = 0; q < Q; q++) mixed[q] += value * h.scores[q * room + p];
        }
        for (int i = 1; i < Q; i++) {  // not for the queries before: 0 times a value that is not finite is NaN
            F16 value = bfloat(h.values + (size_t)(position + i) * h.width + d);
            for (int q = i; q < Q; q++) mixed[q] += value * h.scores[q * room + position + i];
        }
        for (int q = 0; q < Q; q++) {
            F16 y = mixed[q] * total[q];
            memcpy(h.out + (size_t)(row + q) * h.out_stride + d, &y, sizeof(float) * (h.dim - d < 16 ? h.dim - d : 16));
        }
    }
}
template <int Q> INLINE void queries_of(const Head &h, const Span &span, int i, int room) {
    for (; i + Q <= span.count; i += Q) attend<Q>(h, span.start + i, i, room);
    if constexpr (Q > 1) queries_of<Q - 1>(h, span, i, room);
}
/// Write keys and values of every sequence, then attend; a head of a sequence is one thread's.
static void attention(const Model &m, const Step &s, int layer, float *scores) {
    const int e = m.n_embd, dim = e / m.n_head, width = padded(dim, 16), room = padded(m.n_positions, 16);
    const int stride = padded(3 * e, 32), out_stride = padded(e, 32);
#pragma omp for collapse(2) schedule(dynamic)
    for (int i = 0; i < s.n_spans; i++)
        for (int head = 0; head < m.n_head; head++) {
            const Span &span = s.spans[i];
            const size_t plane = (size_t)span.capacity * width;
            uint16_t *keys = span.kv + ((size_t)layer * 2 * m.n_head + head) * plane, *values = keys + m.n_head * plane;
            const float *qkv = s.wide + (size_t)span.row * stride + head * dim;
            for (int r = 0; r < span.count; r++)
                for (int d = 0; d < dim; d++) {
                    const int p = span.start + r;
                    keys[(size_t)(p / 16 * 16) * width + 16 * d + p % 16] = rounded(qkv[(size_t)r * stride + e + d]);
                    values[(size_t)p * width + d] = rounded(qkv[(size_t)r * stride + 2 * e + d]);
                }
            float *out = s.mixed + (size_t)span.row * out_stride + head * dim;
            Head h{qkv, keys, values, out, scores, stride, dim, width, out_stride, m.layers[layer].attention_scale};
            queries_of<QUERIES>(h, span, 0, room);
        }
}

static void forward(const Model &m, const Step &s) {
    const int width = padded(m.n_embd, 32), room = padded(m.n_positions, 16);
#pragma omp parallel num_threads(s.threads)
    {
        float *scores = s.scores + (size_t)omp_get_thread_num() * QUERIES * room;
        embed(m, s);
        for (int i = 0; i < m.n_layer; i++) {
            const Layer &h = m.layers[i];
            norm_and_quantise(h.ln_1, m, s);
            linear(h.c_attn, s, s.rows, s.wide, 32 * h.c_attn.groups, STORE);
            attention(m, s, i, scores);
            quantise_rows(s.mixed, width, s);
            linear(h.attn_c_proj, s, s.rows, s.x, width, ADD);
            norm_and_quantise(h.ln_2, m, s);
            linear(h.c_fc, s, s.rows, s.wide, 32 * h.c_fc.groups, m.activation);
            quantise_rows(s.wide, 32 * h.c_fc.groups, s);
            linear(h.mlp_c_proj, s, s.rows, s.x, width, ADD);
        }
#pragma omp for
        for (int i = 0; i < s.n_wanted; i++) {
            norm(s.x + (size_t)s.wanted[i] * width, m.ln_f, m, s.mixed + (size_t)i * width);
            quantise(s.mixed + (size_t)i * width, width, s, i);
        }
        linear(m.lm_head, s, s.n_wanted, s.logits, 32 * m.lm_head.groups, STORE);
    }
}
}}  // namespace
#endif
