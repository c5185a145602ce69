// Sparse linear. A few samples: sixteen rows at a time, each entry looked up in a window of 32 columns.
// More: samples become the lanes of panels, as pixels do in a convolution.
#pragma once
#include "panel.h"
#include "threads.h"
#include "transpose.h"

namespace sn {

constexpr int kSlice = 16, kWindow = 32;
constexpr int64_t kFew = V == 16 ? 4 : 1;  // samples up to which the sliced rows are faster
constexpr int64_t kLanes = 4 * V;  // samples of a block of panels

struct Layer {
  const Header* h;
  const float* bias;
  int activation;
};

// --- a few samples

// One step of a slice: sixteen products added to the sums of each of B samples.
#if SN_LANES == 16 && defined(__AVX512F__)

static inline __m512 sixteen(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512 sixteen(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

template <int B>
struct Sums {
  __m512 sum[B] = {};
};

template <int B, class T>
static inline void step(Sums<B>& to, const float* window, int64_t stride, const uint8_t* lanes, const T* values) {
  const __m512i lane = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)lanes));
  const __m512 value = sixteen(values);
  SN_UNROLL for (int b = 0; b < B; ++b) {
    const float* p = window + b * stride;
    const __m512 in = _mm512_permutex2var_ps(_mm512_loadu_ps(p), lane, _mm512_loadu_ps(p + 16));
    to.sum[b] = _mm512_fmadd_ps(value, in, to.sum[b]);
  }
}

#elif SN_LANES == 8 && defined(__AVX2__)

template <int B>
struct Sums {
  __m256 sum[B][2] = {};
};

static inline __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
static inline __m256 eight(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}

// window[lane] for eight lanes of 0..31: four permutes, chosen between by the bits 3 and 4
static inline __m256 look_up(const float* window, __m256i lane) {
  const __m256 a = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window), lane);
  const __m256 b = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + 8), lane);
  const __m256 c = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + 16), lane);
  const __m256 d = _mm256_permutevar8x32_ps(_mm256_loadu_ps(window + 24), lane);
  const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(lane, 28));
  const __m256 bit4 = _mm256_castsi256_ps(_mm256_slli_epi32(lane, 27));
  return _mm256_blendv_ps(_mm256_blendv_ps(a, b, bit3), _mm256_blendv_ps(c, d, bit3), bit4);
}

template <int B, class T>
static inline void step(Sums<B>& to, const float* window, int64_t stride, const uint8_t* lanes, const T* values) {
  SN_UNROLL for (int half = 0; half < 2; ++half) {
    const __m256i lane = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(lanes + half * 8)));
    const __m256 value = eight(values + half * 8);
    SN_UNROLL for (int b = 0; b < B; ++b)
      to.sum[b][half] = _mm256_fmadd_ps(value, look_up(window + b * stride, lane), to.sum[b][half]);
  }
}

#else

template <int B>
struct Sums {
  float sum[B][kSlice] = {};
};

template <int B, class T>
static inline void step(Sums<B>& to, const float* window, int64_t stride, const uint8_t* lanes, const T* values) {
  float value[kSlice];
  if constexpr (sizeof(T) == 2) widen(values, kSlice, value);
  else std::memcpy(value, values, sizeof value);
  for (int b = 0; b < B; ++b)
    for (int l = 0; l < kSlice; ++l) to.sum[b][l] += value[l] * window[b * stride + lanes[l]];
}

#endif

// sum[b][lane] of one slice; odd and even steps are added apart, so that their chains overlap
template <class T, int B>
static void slice(const Header& h, int s, const float* x, int64_t stride, float (&sum)[B][kSlice]) {
  const int32_t* starts = at<int32_t>(&h, h.slice_starts);
  const int32_t* bases = at<int32_t>(&h, h.slice_bases);
  const uint8_t* lanes = at<uint8_t>(&h, h.slice_lanes);
  const T* values = at<T>(&h, h.slice_values);
  const int64_t end = starts[s + 1];
  Sums<B> even, odd;
  static_assert(sizeof even == sizeof sum, "sums lie as rows of sixteen");
  int64_t i = starts[s];
  for (; i + 1 < end; i += 2) {
    step(even, x + bases[i], stride, lanes + i * kSlice, values + i * kSlice);
    step(odd, x + bases[i + 1], stride, lanes + (i + 1) * kSlice, values + (i + 1) * kSlice);
  }
  if (i < end) step(even, x + bases[i], stride, lanes + i * kSlice, values + i * kSlice);
  float other[B][kSlice];
  std::memcpy(sum, &even, sizeof sum);
  std::memcpy(other, &odd, sizeof other);
  for (int b = 0; b < B; ++b)
    for (int l = 0; l < kSlice; ++l) sum[b][l] += other[b][l];
}

template <int B>
static void slice_task(const Layer& layer, int s, const float* x, int64_t stride, float* y) {
  const Header& h = *layer.h;
  float sum[B][kSlice];
  h.dtype == kFloat32 ? slice<float>(h, s, x, stride, sum) : slice<uint16_t>(h, s, x, stride, sum);
  const int first = s * kSlice, count = std::min(kSlice, h.rows - first);
  const int32_t* order = order_of(h);
  for (int b = 0; b < B; ++b, y += h.rows) {
    for (int l = 0; layer.bias && l < count; ++l) sum[b][l] += layer.bias[row_at(order, first + l)];
    if (layer.activation) activate_all(sum[b], kSlice / V, layer.activation);
    if (!order) std::memcpy(y + first, sum[b], static_cast<size_t>(count) * 4);
    else for (int l = 0; l < count; ++l) y[order[first + l]] = sum[b][l];
  }
}

// windows are 32 wide: a shorter sample is copied beside zeros
static const float* widened(const float* x, int64_t batch, int64_t columns) {
  float* wide = scratch.get<float>(kPadded, batch * kWindow);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < kWindow; ++c) wide[b * kWindow + c] = c < columns ? x[b * columns + c] : 0.f;
  return wide;
}

static void linear_few(const Layer& layer, const float* x, int64_t batch, float* y, int threads) {
  const Header& h = *layer.h;
  const int64_t stride = std::max<int64_t>(h.channels, kWindow);
  if (h.channels < kWindow) x = widened(x, batch, h.channels);
  const int team = useful_threads(threads, static_cast<double>(h.steps) * kSlice * static_cast<double>(batch));
  parallel(h.slices, team, [&](int64_t s) {
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4) slice_task<4>(layer, static_cast<int>(s), x + b * stride, stride, y + b * h.rows);
    for (; b + 2 <= batch; b += 2) slice_task<2>(layer, static_cast<int>(s), x + b * stride, stride, y + b * h.rows);
    for (; b < batch; ++b) slice_task<1>(layer, static_cast<int>(s), x + b * stride, stride, y + b * h.rows);
  });
}

// --- samples as lanes

// lanes in and lanes out; threads share the rows
static void lanes_layer(const Layer& layer, const float* x, float* y, int64_t pitch, int threads) {
  Rows w = rows_of(*layer.h, layer.bias, layer.activation);
  w.stride = pitch;
  const int64_t shares = std::min(threads, w.units);
  parallel(shares, threads, [&](int64_t share) {
    const int from = static_cast<int>(w.units * share / shares), to = static_cast<int>(w.units * (share + 1) / shares);
    float* partial = scratch.get<float>(kPartial, static_cast<int64_t>(to - from) * w.block * kWidest * V);
    panels(w, 0, pitch / V, [&](int64_t begin, int64_t end) {
      any_panel(w, end - begin, from, to, x + begin * V, partial, Plain{y + begin * V, pitch});
    });
  });
}

// A run of layers, block of samples by block of samples; between them samples stay lanes. Threads share the blocks or,
// where there are fewer than threads, the rows.
static void linear_lanes(const Layer* layers, int count, const float* x, int64_t batch, float* y, int threads) {
  const int64_t columns = layers[0].h->channels, rows = layers[count - 1].h->rows;
  int64_t widest_row = columns;
  for (int i = 0; i < count; ++i) widest_row = std::max<int64_t>(widest_row, layers[i].h->rows);
  double work = 0;
  for (int i = 0; i < count; ++i) work += static_cast<double>(layers[i].h->nonzeros) * static_cast<double>(batch);
  threads = useful_threads(threads, work);
  const int64_t even = std::max<int64_t>(1, ceil_pos(ceil_pos(batch, threads), V)) * V;
  const bool by_rows = ceil_pos(batch, even) < threads;
  const int64_t block = std::min(kLanes, by_rows ? ceil_pos(batch, V) * V : even);
  parallel(ceil_pos(batch, block), by_rows ? 1 : threads, [&](int64_t task) {
    const int64_t first = task * block, samples = std::min(block, batch - first);
    const int64_t pitch = ceil_pos(samples, V) * V;
    float* in = scratch.get<float>(kPing, widest_row * pitch);
    float* out = scratch.get<float>(kPong, widest_row * pitch);
    if (samples < pitch) std::memset(in, 0, static_cast<size_t>(columns * pitch) * 4);
    transpose(x + first * columns, samples, columns, columns, in, pitch);
    for (int i = 0; i < count; ++i) {
      lanes_layer(layers[i], in, out, pitch, by_rows ? threads : 1);
      std::swap(in, out);
    }
    transpose(in, rows, samples, pitch, y + first * rows, rows);
  });
}

static void linear_chain(const Layer* layers, int count, const float* x, int64_t batch, float* y, int threads) {
  if (batch > kFew) return linear_lanes(layers, count, x, batch, y, threads);
  int64_t widest_row = 0;
  for (int i = 0; i + 1 < count; ++i) widest_row = std::max<int64_t>(widest_row, layers[i].h->rows);
  float* out = count > 1 ? scratch.get<float>(kPing, widest_row * batch) : nullptr;
  float* next = count > 2 ? scratch.get<float>(kPong, widest_row * batch) : nullptr;
  for (int i = 0; i < count; ++i, std::swap(out, next)) {
    float* to = i + 1 == count ? y : out;
    linear_few(layers[i], x, batch, to, threads);
    x = to;
  }
}

}  // namespace sn
