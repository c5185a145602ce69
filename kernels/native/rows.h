// What works row by row on views, whatever their layout: pooling, sums, copies. Edges are
// lanes that are not read.
#pragma once
#include "axis.h"
#include "threads.h"
#include "view.h"

namespace sn {

static inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
static inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// lanes from output column j whose input column, moved by `shift`, is a real one
template <int S>
static inline Column<S> columns(int64_t j, int64_t shift, int64_t stride, int64_t in, int64_t out) {
  const int64_t start = j * stride + shift;
  return column<S>(ceil_div(-start, stride), std::min(out - j, ceil_div(in - start, stride)));
}

// --- pooling

enum Pool : int { kMax, kAverage, kAverageAll };  // the last counts the padding too

struct Pooling {
  View in, out;
  Axis rows, cols;
  int kind;
};

template <int S>
static void pool_plane(const Pooling& p, const float* x, float* y) {
  const vf none = splat(p.kind == kMax ? -std::numeric_limits<float>::infinity() : 0.f);
  for (int64_t j = 0; j < p.cols.out; j += V) {
    vf across = {};  // real columns under each output
    for (int64_t k = 0; k < p.cols.taps; ++k) {
      const Column<S> c = columns<S>(j, k - p.cols.pad, p.cols.stride, p.cols.in, p.cols.out);
      for (int l = c.first; l < c.last; ++l) across[l] += 1.f;
    }
    for (int64_t r = 0; r < p.rows.out; ++r) {
      vf acc = none;
      int64_t down = 0;
      for (int64_t i = 0; i < p.rows.taps; ++i) {
        const int64_t source = r * p.rows.stride + i - p.rows.pad;
        if (source < 0 || source >= p.rows.in) continue;
        ++down;
        const float* from = x + source * p.in.pitch + j * p.cols.stride - p.cols.pad;
        for (int64_t k = 0; k < p.cols.taps; ++k) {
          const Column<S> c = columns<S>(j, k - p.cols.pad, p.cols.stride, p.cols.in, p.cols.out);
          const vf in = load<S>(from + k, p.cols.stride, c, none);
          acc = p.kind == kMax ? (in != in || in > acc ? in : acc) : acc + in;
        }
      }
      if (p.kind == kAverage) acc /= across * static_cast<float>(down);
      if (p.kind == kAverageAll) acc /= splat(static_cast<float>(p.rows.taps * p.cols.taps));
      store(y + r * p.out.pitch + j, some(0, p.cols.out - j), acc);
    }
  }
}

static void pool(const Pooling& p, int64_t images, int64_t channels, int threads) {
  const double work = static_cast<double>(p.rows.taps * p.cols.taps * p.rows.out * p.cols.out * images * channels);
  parallel(images * channels, useful_threads(threads, kTouch * work), [&](int64_t task) {
    const int64_t n = task / channels, c = task % channels;
    const float* x = p.in.at(n, c);
    float* y = p.out.at(n, c);
    p.cols.stride == 1 ? pool_plane<1>(p, x, y) : p.cols.stride == 2 ? pool_plane<2>(p, x, y) : pool_plane<0>(p, x, y);
    clear_around(p.out, n, c);
  });
}

// --- element by element

// out[c + at] = act(in[c] (+ other[c])), every stride-th pixel; other channels of `out` are not touched
struct Map {
  View in, other, out;
  bool two;
  int64_t stride;
  int activation;
};

template <int S>
static void map_plane(const Map& m, int64_t n, int64_t c) {
  const bool whole = m.in.whole() && m.out.whole() && m.stride == 1 && (!m.two || m.other.whole());
  const int64_t rows = whole ? 1 : m.out.height, width = whole ? m.out.height * m.out.width : m.out.width;
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = m.in.at(n, c) + r * m.stride * m.in.pitch;
    const float* b = m.two ? m.other.at(n, c) + r * m.other.pitch : nullptr;
    float* y = m.out.at(n, c) + r * m.out.pitch;
    for (int64_t j = 0; j < width; j += V) {
      vf v = load<S>(x + j * m.stride, m.stride, column<S>(0, width - j), vf{});
      if (b) v += load(b + j, some(0, width - j), vf{});
      store(y + j, some(0, width - j), activate(v, m.activation));
    }
  }
}

static void map(const Map& m, int64_t images, int64_t channels, int threads) {
  const double work = static_cast<double>(m.out.height * m.out.width * images * channels);
  parallel(images * channels, useful_threads(threads, kTouch * work), [&](int64_t task) {
    const int64_t n = task / channels, c = task % channels;
    m.stride == 1 ? map_plane<1>(m, n, c) : m.stride == 2 ? map_plane<2>(m, n, c) : map_plane<0>(m, n, c);
    clear_around(m.out, n, c);
  });
}

static void zero(const View& v, int64_t images, int64_t channels) {
  for (int64_t n = 0; n < images; ++n)
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t r = 0; r < v.height; ++r) clear(v.at(n, c) + r * v.pitch, v.width);
      clear_around(v, n, c);
    }
}

// the mean of every channel; out is (images, channels)
static void mean(const View& in, int64_t images, int64_t channels, float* out, int threads) {
  const int64_t rows = in.whole() ? 1 : in.height, width = in.whole() ? in.height * in.width : in.width;
  const double work = static_cast<double>(in.height * in.width * images * channels);
  parallel(images * channels, useful_threads(threads, kTouch * work), [&](int64_t task) {
    const float* x = in.at(task / channels, task % channels);
    vf sum = {};
    for (int64_t r = 0; r < rows; ++r, x += in.pitch)
      for (int64_t j = 0; j < width; j += V) sum += load(x + j, some(0, width - j), vf{});
    float total = 0;
    for (int l = 0; l < V; ++l) total += sum[l];
    out[task] = total / static_cast<float>(in.height * in.width);
  });
}

}  // namespace sn
