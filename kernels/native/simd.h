// Vectors of SN_LANES floats, the one place that names an instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

// arrays of sums stay in registers only if every loop over them is unrolled early
#if defined(__clang__)
#define SN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SN_UNROLL _Pragma("GCC unroll 16")
#endif

// what is loaded is loaded once, not again for each use
#if defined(__AVX512F__)
#define SN_IN_REGISTER(v) asm("" : "+v"(v))
#elif defined(__x86_64__)
#define SN_IN_REGISTER(v) asm("" : "+x"(v))
#elif defined(__aarch64__)
#define SN_IN_REGISTER(v) asm("" : "+w"(v))
#else
#define SN_IN_REGISTER(v)
#endif

namespace sn {

constexpr int V = SN_LANES;
typedef float vf __attribute__((vector_size(V * 4)));
typedef int32_t vi __attribute__((vector_size(V * 4)));

static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// bfloat16 is the upper half of a float32
static inline void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float a) { return a - vf{}; }  // a - 0 is a, and folds to a broadcast
static inline vf vmin(vf a, vf b) { return a > b ? b : a; }  // a NaN in `a` stays
static inline vf vmax(vf a, vf b) { return a < b ? b : a; }

// lane i of the result is lane perm[i] of v
static inline vf permute(vf v, const int32_t* perm) {
#if SN_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps(_mm512_loadu_si512(perm), (__m512)v);
#elif SN_LANES == 8 && defined(__AVX2__)
  return (vf)_mm256_permutevar8x32_ps((__m256)v, _mm256_loadu_si256((const __m256i*)perm));
#else
  vf out;
  for (int i = 0; i < V; ++i) out[i] = v[perm[i]];
  return out;
#endif
}

// a vector of fours, `step` floats from one to the next
static inline vf load_fours(const float* p, int64_t step) {
#if SN_LANES == 16 && defined(__AVX512F__)
  const auto two = [&](const float* q) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(q)), _mm_loadu_ps(q + step), 1);
  };
  return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(two(p)), two(p + 2 * step), 1);
#elif SN_LANES == 8 && defined(__AVX2__)
  return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
#else
  vf v;
  for (int i = 0; i < V; i += 4) std::memcpy(reinterpret_cast<float*>(&v) + i, p + i / 4 * step, 16);
  return v;
#endif
}
static inline void store_fours(float* p, int64_t step, vf v) {
  for (int i = 0; i < V; i += 4) std::memcpy(p + i / 4 * step, reinterpret_cast<const float*>(&v) + i, 16);
}

// Some lanes of a vector: [first, last).
#if SN_LANES == 16 && defined(__AVX512F__)
struct Some {
  __mmask16 mask;
};
static inline Some some(int64_t first, int64_t last) {
  const uint32_t below = last >= V ? 0xffffu : last <= 0 ? 0u : (1u << last) - 1u;
  const uint32_t from = first <= 0 ? 0xffffu : first >= V ? 0u : 0xffffu << first;
  return {static_cast<__mmask16>(below & from)};
}
// no other lane is read; it is `fill`
static inline vf load(const float* p, Some s, vf fill) { return (vf)_mm512_mask_loadu_ps((__m512)fill, s.mask, p); }
static inline void store(float* p, Some s, vf v) { _mm512_mask_storeu_ps(p, s.mask, (__m512)v); }
#else
struct Some {
  int first, last;
};
static inline Some some(int64_t first, int64_t last) {
  return {static_cast<int>(first < 0 ? 0 : first > V ? V : first), static_cast<int>(last < 0 ? 0 : last > V ? V : last)};
}
#if SN_LANES == 8 && defined(__AVX2__)
static inline vf load(const float* p, Some s, vf fill) {
  alignas(32) static const int32_t from[16] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
  alignas(32) static const int32_t below[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  const __m256i mask = _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(from + V - s.first)),
                                        _mm256_loadu_si256((const __m256i*)(below + V - s.last)));
  return (vf)_mm256_blendv_ps((__m256)fill, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
// in pieces: a masked store takes dozens of cycles on some processors
static inline void store(float* p, Some s, vf v) {
  if (s.first == 0 && s.last == V) return store(p, v);
  if (s.first != 0) {
    for (int i = s.first; i < s.last; ++i) p[i] = v[i];
    return;
  }
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (s.last & 4) _mm_storeu_ps(p, part), p += 4, part = _mm256_extractf128_ps((__m256)v, 1);
  if (s.last & 2) _mm_storel_pi((__m64*)p, part), p += 2, part = _mm_movehl_ps(part, part);
  if (s.last & 1) _mm_store_ss(p, part);
}
#else
static inline vf load(const float* p, Some s, vf fill) {
  if (s.first == 0 && s.last == V) return load(p);
  for (int i = s.first; i < s.last; ++i) fill[i] = p[i];
  return fill;
}
static inline void store(float* p, Some s, vf v) {
  if (s.first == 0 && s.last == V) return store(p, v);
  for (int i = s.first; i < s.last; ++i) p[i] = v[i];
}
#endif
#endif

// every second float of two vectors, from the first or from the second on
template <int... I>
static inline vf evens(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
template <int... I>
static inline vf odds(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}
template <int K, int... I>
static inline vf shifted(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I + K)...);
}
static inline vf evens(vf a, vf b) { return evens(a, b, std::make_integer_sequence<int, V>()); }
static inline vf odds(vf a, vf b) { return odds(a, b, std::make_integer_sequence<int, V>()); }
// V floats of two vectors from the K-th on
template <int K>
static inline vf shifted(vf a, vf b) {
#if SN_LANES == 16 && defined(__AVX512F__)
  return (vf)_mm512_alignr_epi32((__m512i)b, (__m512i)a, K);
#else
  return shifted<K>(a, b, std::make_integer_sequence<int, V>());
#endif
}

// Lanes [first, last) of every S-th float; S 0: of every `stride`-th.
template <int S>
struct Column {
  Some low, high;
  int first, last;
};
template <int S>
static inline Column<S> column(int64_t first, int64_t last) {
  if (first < 0) first = 0;
  if (last > V) last = V;
  if (last < first) last = first;
  const bool any = last > first;
  const Some low = S == 2 ? some(any ? 2 * first : V, 2 * last - 1) : some(first, last);
  return {low, some(any ? 2 * first - V : V, 2 * last - 1 - V), static_cast<int>(first), static_cast<int>(last)};
}
template <int S>
static inline vf load(const float* p, int64_t stride, Column<S> c, vf fill) {
  if constexpr (S == 1) return load(p, c.low, fill);
  if constexpr (S == 2) return evens(load(p, c.low, fill), load(p + V, c.high, fill));
  for (int i = c.first; i < c.last; ++i) fill[i] = p[i * stride];
  return fill;
}

// e^x by 2^n * e^r, |r| <= ln(2)/2, and a Taylor polynomial of degree 7: about 1 ulp
static inline vf vexp(vf x) {
  const vf clipped = vmin(vmax(x, splat(-87.3f)), splat(88.3f));
  const vf shift = splat(12582912.f);  // 1.5 * 2^23 rounds to the nearest integer
  const vf n = (clipped * 1.44269504088896341f + shift) - shift;
  const vf r = (clipped - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  vf p = splat(1.f / 5040.f);
  p = p * r + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x == x ? p * scale : x;
}

static inline vf silu(vf x) { return x / (1.f + vexp(-x)); }

// x * Phi(x); erfc by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7)
static inline vf gelu(vf x) {
  const vf a = vmax(x, -x) * 0.70710678118654752f;
  const vf t = 1.f / (1.f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf half_tail = 0.5f * p * t * vexp(-a * a);
  return x < 0.f ? x * half_tail : x - x * half_tail;
}

enum Activation : int { kNone, kRelu, kRelu6, kSilu, kGelu, kActivations };

static __attribute__((noinline)) vf curved(vf x, int kind) { return kind == kSilu ? silu(x) : gelu(x); }

static inline vf activate(vf x, int kind) {
  switch (kind) {
    case kNone: return x;
    case kRelu: return vmax(x, vf{});
    case kRelu6: return vmin(vmax(x, vf{}), splat(6.f));
    default: return curved(x, kind);
  }
}

static inline void activate_all(float* x, int vectors, int kind) {
  for (int i = 0; i < vectors; ++i) store(x + i * V, activate(load(x + i * V), kind));
}

}  // namespace sn
