// Depthwise convolution with V channels in a vector. Rows are turned as they are read, so that taps are aligned and no
// lane is beyond a row, and two rows of outputs share products (fast FIR filters; Lavin and Gray, 2016,
// arXiv:1509.09308): of rows a to f of input, the outputs under taps g0 to g4 are
//   both + apart + (a - c) g0 + (d - e) g3   and   both - apart + (d - b) g2 + (f - e) g4,  where
//   both = (b + c) (g0 + g1 + g2) / 2 + e (g3 + g4)   and   apart = (c - b) (g0 - g1 + g2) / 2,
// 7 products for 10, and of three taps (without e and f) 4 for 6. Sums and differences of rows run beside products. The
// factors are 1 and 1/2, so that rounding stays what it is; of an infinite input NaN may come where infinity would.
#pragma once
#include "conv2d.h"
#include "threads.h"
#include "transpose.h"

namespace sn {

constexpr int kNear = 4;  // pixels at a time

// a row of V channels
static inline __attribute__((always_inline)) void turn_row(const float* x, int64_t width, int64_t channel, float* to) {
  for (int64_t j = 0; j < width; j += 4) {
    const int64_t at = std::min(j, width - 4);
    vf pixels[4];
    SN_UNROLL for (int i = 0; i < 4; ++i) pixels[i] = load_fours(x + at + i * channel, 4 * channel);
    turn_fours(pixels);
    SN_UNROLL for (int i = 0; i < 4; ++i) store(to + (at + i) * V, pixels[i]);
  }
}

// rows of K weights, in the order of the products
template <int K>
static void pair_weights(const Conv& c, int64_t channel, float* to) {
  constexpr int all = K * K;
  const int32_t *starts = c.w.starts + channel, first = starts[0];
  float some_zero[V * all] = {}, taps[all * V];
  const bool whole = starts[V] - first == V * all;
  for (int lane = 0; lane < V && !whole; ++lane)
    for (int32_t i = starts[lane]; i < starts[lane + 1]; ++i) some_zero[lane * all + c.w.offsets[i]] = c.w.values[i];
  turn_row(whole ? c.w.values + first : some_zero, all, all, taps);
  for (int l = 0; l < K; ++l) {
    const auto g = [&](int k) { return load(taps + (k * K + l) * V); };
    float* way = to + l * V;
    const auto put = [&](vf v) { store(way, v), way += K * V; };
    put((g(0) - g(1) + g(2)) * .5f), put((g(0) + g(1) + g(2)) * .5f);
    if constexpr (K == 5) put(g(3) + g(4));
    put(g(0));
    if constexpr (K == 5) put(g(3));
    put(g(2));
    if constexpr (K == 5) put(g(4));
  }
}

template <int K>
static inline __attribute__((always_inline)) void add_taps(vf (&sum)[kNear], const vf (&weight)[K], int i, vf in) {
  SN_IN_REGISTER(in);
  SN_UNROLL for (int l = 0; l < K; ++l)
    if (i - l >= 0 && i - l < kNear) sum[i - l] += weight[l] * in;
}

template <int K>
static inline __attribute__((always_inline)) void load_weights(vf (&to)[K], const float*& weights) {
  SN_UNROLL for (int l = 0; l < K; ++l) to[l] = load(weights + l * V);
  weights += K * V;
}

// adds a row of input, less another, times a row of weights
template <int K, bool Less>
static inline __attribute__((always_inline)) void along(vf (&sum)[kNear], const float*& weights, const float* row,
                                                        const float* other) {
  asm("" : "+r"(weights), "+r"(row), "+r"(other));  // else all that is loaded is kept, and sums are not
  vf weight[K];
  load_weights(weight, weights);
  SN_UNROLL for (int i = 0; i < kNear - 1 + K; ++i)
    add_taps(sum, weight, i, Less ? load(row + i * V) - load(other + i * V) : load(row + i * V));
}

// adds both the difference of two rows and their sum: loads are what binds
template <int K>
static inline __attribute__((always_inline)) void along(vf (&apart)[kNear], vf (&both)[kNear], const float*& weights,
                                                        const float* row, const float* other) {
  vf less[K], plus[K];
  load_weights(less, weights), load_weights(plus, weights);
  SN_UNROLL for (int i = 0; i < kNear - 1 + K; ++i) {
    vf a = load(row + i * V), b = load(other + i * V);
    SN_IN_REGISTER(a);
    SN_IN_REGISTER(b);
    add_taps(apart, less, i, a - b), add_taps(both, plus, i, a + b);
  }
}

// kNear pixels of V channels
static inline __attribute__((always_inline)) void put(vf (&y)[kNear], int activation, float* to, int64_t channel) {
  if (activation != kNone)
    SN_UNROLL for (int i = 0; i < kNear; ++i) y[i] = activate(y[i], activation);
  turn_fours(y);
  SN_UNROLL for (int i = 0; i < kNear; ++i, to += channel) {
    asm("" : "+r"(to));  // else the addresses of all channels are kept, and spilled
    store_fours(to, 4 * channel, y[i]);
  }
}

struct PairOut {
  float* y;
  int64_t width, pitch, channel;
  int activation;
};

// kNear pixels of two rows of outputs, from the rows of input under them
template <int K>
static inline __attribute__((always_inline)) void near(const float* const (&rows)[K + 1], int64_t at,
                                                       const float* weights, vf bias, const PairOut& out) {
  const auto row = [&](int k) { return rows[k] + at * V; };
  vf first[kNear], both[kNear], apart[kNear];
  SN_UNROLL for (int i = 0; i < kNear; ++i) both[i] = bias, apart[i] = vf{};
  along<K>(apart, both, weights, row(2), row(1));
  if constexpr (K == 5) along<K, false>(both, weights, row(4), row(4));
  SN_UNROLL for (int i = 0; i < kNear; ++i) first[i] = both[i] + apart[i], both[i] -= apart[i];
  along<K, true>(first, weights, row(0), row(2));
  if constexpr (K == 5) along<K, true>(first, weights, row(3), row(4));
  put(first, out.activation, out.y + at, out.channel);
  along<K, true>(both, weights, row(3), row(1));
  if constexpr (K == 5) along<K, true>(both, weights, row(5), row(4));
  put(both, out.activation, out.y + out.pitch + at, out.channel);
}

template <int K>
static void pair(const float* const (&rows)[K + 1], const float* weights, vf bias, const PairOut& out) {
  for (int64_t j = 0; j + kNear <= out.width; j += kNear) near<K>(rows, j, weights, bias, out);
  if (out.width % kNear) near<K>(rows, out.width - kNear, weights, bias, out);
}

// rows [first, last) of outputs of V channels
template <int K>
static void depthwise_channels(const Conv& c, int64_t image, int64_t channel, int64_t first, int64_t last) {
  // an odd number of pixels: no two rows clash in the first-level cache
  const int64_t width = (std::max(c.cols.out + K - 1, c.cols.pad + c.cols.in) | 1) * V;
  alignas(64) float weights[(2 * K - 2 - K / 5) * K * V];
  pair_weights<K>(c, channel, weights);
  float* ring = scratch.get<float>(kPadded, (K + 2) * width);
  const float* zeros = ring + (K + 1) * width;
  clear(ring, (K + 2) * width);
  const vf bias = c.w.bias ? load(c.w.bias + channel) : vf{};
  const float* x = c.in.at(image, channel);
  const auto place = [&](int64_t source) { return ring + source % (K + 1) * width; };
  int64_t have = std::max<int64_t>(0, first - c.rows.pad);
  for (int64_t i = first; i < last; i += 2) {
    // the last pair ends with the plane and may compute a row a second time
    const int64_t row = std::min(i, c.rows.out - 2), top = row - c.rows.pad;
    for (; have < std::min(c.rows.in, top + K + 1); ++have)
      turn_row(x + have * c.in.pitch, c.cols.in, c.in.channel, place(have) + c.cols.pad * V);
    const float* rows[K + 1];
    for (int k = 0; k <= K; ++k) rows[k] = top + k >= 0 && top + k < c.rows.in ? place(top + k) : zeros;
    float* y = c.out.at(image, channel) + row * c.out.pitch;
    pair<K>(rows, weights, bias, {y, c.cols.out, c.out.pitch, c.out.channel, c.w.activation});
  }
}

// how many of V channels fall into one set of the first-level cache, which holds eight lines
static inline int64_t crowd(const View& v) { return v.channel % 1024 == 0 ? V : v.channel % 512 == 0 ? V / 2 : 1; }

// 3x3 pays for turning by what it saves of vectors that rows do not fill; measured
static inline bool channels_pay(const Conv& c) {
  const bool near = c.rows.stride == 1 && c.cols.stride == 1 && c.rows.dilation == 1 && c.cols.dilation == 1;
  const bool fits = c.cols.in >= 4 && c.cols.out >= kNear && c.rows.out >= 2;
  const int64_t most = std::max(crowd(c.in), crowd(c.out)), lanes = ceil_pos(c.cols.out, V) * V;
  const bool unfilled = V <= 8 || lanes == V || (lanes <= 3 * V && 8 * c.cols.out <= 7 * lanes);
  return near && fits && (c.rows.taps == 5 ? most <= 8 : most < 8 && unfilled);
}

// the first `channels`, a multiple of V
template <int K>
static void conv_channels(const Conv& c, int64_t channels) {
  // bands begin with even rows and the last holds an odd row, so that sums are the same whatever their number
  const int64_t pairs = c.rows.out / 2, planes = c.images * channels / V;
  const int64_t bands = c.threads == 1 ? 1 : std::min(pairs, ceil_pos(8 * c.threads, planes));
  parallel(planes * bands, c.threads, [&](int64_t task) {
    const int64_t band = task % bands, plane = task / bands, image = plane / (channels / V);
    const int64_t channel = plane % (channels / V) * V;
    const int64_t last = band + 1 == bands ? c.rows.out : pairs * (band + 1) / bands * 2;
    depthwise_channels<K>(c, image, channel, pairs * band / bands * 2, last);
    for (int k = 0; k < V && band == 0; ++k) clear_around(c.out, image, channel + k);
  });
}

}  // namespace sn
