// Depthwise convolution of 3x3 and 5x5 kernels, row by row: a row of input is loaded once for all rows of output that
// it serves; columns outside are lanes that are not read, so that no borders are needed.
#pragma once
#include "conv2d.h"
#include "rows.h"

namespace sn {

struct Depthwise {
  View in, out;
  Axis rows, cols;
  const float* weight;  // [taps]
  float bias;
  int activation;
};

// R output rows `step` apart from `row`, one vector of columns; a row of input serves all of them
template <int K, int S, int R>
static inline void depthwise_rows(const Depthwise& d, const Column<S> (&cols)[K], const float* x, float* y, Some lanes,
                                  int64_t row, int64_t step) {
  vf acc[R];
  SN_UNROLL for (int r = 0; r < R; ++r) acc[r] = splat(d.bias);
  SN_UNROLL for (int i = 0; i < R + K - 1; ++i) {
    const int64_t source = d.rows.stride * row + d.rows.dilation * i - d.rows.pad;
    if (source < 0 || source >= d.rows.in) continue;
    const float* p = x + source * d.in.pitch;
    SN_UNROLL for (int k = 0; k < K; ++k) {
      const vf in = load<S>(p + k * d.cols.dilation, d.cols.stride, cols[k], vf{});
      SN_UNROLL for (int r = 0; r < R; ++r)
        if (i - r >= 0 && i - r < K) acc[r] += splat(d.weight[(i - r) * K + k]) * in;
    }
  }
  SN_UNROLL for (int r = 0; r < R; ++r) store(y + (row + r * step) * d.out.pitch, lanes, activate(acc[r], d.activation));
}

template <int K, int S>
static void depthwise_plane(const Depthwise& d, const float* x, float* y) {
  constexpr int R = S == 1 ? 4 : 1;
  const int64_t step = R == 1 ? 1 : d.rows.dilation;
  for (int64_t j = 0; j < d.cols.out; j += V) {
    Column<S> cols[K];
    for (int k = 0; k < K; ++k)
      cols[k] = columns<S>(j, k * d.cols.dilation - d.cols.pad, d.cols.stride, d.cols.in, d.cols.out);
    const float* from = x + j * d.cols.stride - d.cols.pad;
    const Some lanes = some(0, d.cols.out - j);
    for (int64_t residue = 0; residue < step; ++residue) {
      const int64_t count = ceil_pos(d.rows.out - residue, step);
      if (R == 1 || count < R) {
        for (int64_t i = 0; i < count; ++i)
          depthwise_rows<K, S, 1>(d, cols, from, y + j, lanes, residue + i * step, step);
        continue;
      }
      // the last block ends with the plane and may compute some rows a second time
      for (int64_t i = 0; i < count; i += R)
        depthwise_rows<K, S, R>(d, cols, from, y + j, lanes, residue + std::min(i, count - R) * step, step);
    }
  }
}

template <int K>
static void depthwise_plane(const Depthwise& d, const float* x, float* y) {
  // neighbouring outputs share rows where the stride is 1; columns 2 apart are two loads and a permute
  if (d.cols.stride == 1 && d.rows.stride == 1) return depthwise_plane<K, 1>(d, x, y);
  if (d.cols.stride == 2) return depthwise_plane<K, 2>(d, x, y);
  return depthwise_plane<K, 0>(d, x, y);
}

static inline bool is_depthwise(const Conv& c) {
  const int64_t kernel = c.rows.taps;
  return c.h->channels == 1 && c.h->groups == c.h->rows && kernel == c.cols.taps && (kernel == 3 || kernel == 5);
}

static void conv_depthwise(const Conv& c) {
  const int64_t channels = c.h->rows;
  parallel(c.images * channels, c.threads, [&](int64_t task) {
    const int64_t n = task / channels, row = task % channels;
    float weight[25] = {};
    for (int32_t i = c.w.starts[row]; i < c.w.starts[row + 1]; ++i) weight[c.w.offsets[i]] = c.w.values[i];
    const Depthwise d{c.in, c.out, c.rows, c.cols, weight, c.w.bias ? c.w.bias[row] : 0.f, c.w.activation};
    const float* x = c.in.at(n, row);
    float* y = c.out.at(n, row);
    c.rows.taps == 3 ? depthwise_plane<3>(d, x, y) : depthwise_plane<5>(d, x, y);
    clear_around(c.out, n, row);
  });
}

}  // namespace sn
