// Transposes, by squares of vectors.
#pragma once
#include <algorithm>

#include "simd.h"

namespace sn {

// rows of a square of V x V floats, halves interleaved: done log2(V) times it is turned
template <int... I>
static inline void interleave(vf a, vf b, vf& low, vf& high, std::integer_sequence<int, I...>) {
  low = __builtin_shufflevector(a, b, (I / 2 + I % 2 * V)...);
  high = __builtin_shufflevector(a, b, (V / 2 + I / 2 + I % 2 * V)...);
}

static inline void transpose_square(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  vf rows[V], next[V];
  SN_UNROLL for (int i = 0; i < V; ++i) rows[i] = load(from + i * from_pitch);
  SN_UNROLL for (int done = 1; done < V; done *= 2) {
    SN_UNROLL for (int i = 0; i < V / 2; ++i)
      interleave(rows[i], rows[i + V / 2], next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, V>());
    SN_UNROLL for (int i = 0; i < V; ++i) rows[i] = next[i];
  }
  SN_UNROLL for (int i = 0; i < V; ++i) store(to + i * to_pitch, rows[i]);
}

static void transpose4(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
#if defined(__SSE2__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_pitch);
  __m128 c = _mm_loadu_ps(from + 2 * from_pitch), d = _mm_loadu_ps(from + 3 * from_pitch);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a), _mm_storeu_ps(to + to_pitch, b);
  _mm_storeu_ps(to + 2 * to_pitch, c), _mm_storeu_ps(to + 3 * to_pitch, d);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * to_pitch + i] = from[i * from_pitch + j];
#endif
}

// rows [first, rows) and columns [begin, cols), four by four
static void transpose_rest(const float* from, int64_t first, int64_t rows, int64_t begin, int64_t cols,
                           int64_t from_pitch, float* to, int64_t to_pitch) {
  for (int64_t c = begin; c < cols; c += 4)
    for (int64_t r = first; r < rows; r += 4) {
      if (c + 4 <= cols && r + 4 <= rows) {
        transpose4(from + r * from_pitch + c, from_pitch, to + c * to_pitch + r, to_pitch);
        continue;
      }
      for (int64_t j = c; j < std::min(c + 4, cols); ++j)
        for (int64_t i = r; i < std::min(r + 4, rows); ++i) to[j * to_pitch + i] = from[i * from_pitch + j];
    }
}

// --- four by four, in every four lanes

template <int A, int B, int C, int D, int... I>
static inline vf pick(vf a, vf b, std::integer_sequence<int, I...>) {
  constexpr int of[4] = {A, B, C, D};
  return __builtin_shufflevector(a, b, (I / 4 * 4 + of[I % 4] % 4 + of[I % 4] / 4 * V)...);
}
// of every four lanes those of a (0 to 3) and b (4 to 7)
template <int A, int B, int C, int D>
static inline vf pick(vf a, vf b) {
  return pick<A, B, C, D>(a, b, std::make_integer_sequence<int, V>());
}
static inline void turn_fours(vf (&v)[4]) {
  const vf a = pick<0, 4, 1, 5>(v[0], v[1]), b = pick<2, 6, 3, 7>(v[0], v[1]);
  const vf c = pick<0, 4, 1, 5>(v[2], v[3]), d = pick<2, 6, 3, 7>(v[2], v[3]);
  v[0] = pick<0, 1, 4, 5>(a, c), v[1] = pick<2, 3, 6, 7>(a, c);
  v[2] = pick<0, 1, 4, 5>(b, d), v[3] = pick<2, 3, 6, 7>(b, d);
}

// --- any matrix

// to[c][r] = from[r][c]
static void transpose(const float* from, int64_t rows, int64_t cols, int64_t from_pitch, float* to, int64_t to_pitch) {
  const int64_t whole_rows = rows / V * V, whole_cols = cols / V * V;
  for (int64_t c = 0; c < whole_cols; c += V)
    for (int64_t r = 0; r < whole_rows; r += V)
      transpose_square(from + r * from_pitch + c, from_pitch, to + c * to_pitch + r, to_pitch);
  transpose_rest(from, whole_rows, rows, 0, whole_cols, from_pitch, to, to_pitch);
  transpose_rest(from, 0, rows, whole_cols, cols, from_pitch, to, to_pitch);
}

}  // namespace sn
