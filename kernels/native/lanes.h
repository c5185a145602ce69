// Images beside each other: a pixel is kPixel floats, one of each image of a group; of fewer images, one of each of
// several bands of rows (parts). Every tap is aligned, whatever its column, and no lane is ever between two rows.
#pragma once
#include "depthwise.h"
#include "linear.h"
#include "lines.h"
#include "rows.h"

namespace sn {

constexpr int64_t kPixel = 16, kPixelVectors = kPixel / V;

// --- edges

// rows above and below a part are the neighbour's: lanes move by one part
template <int Images>
static void exchange(const View& v, float* first) {
  for (int64_t k = 0; k < v.border; ++k) {
    const float* last = first + (v.height - v.border + k) * v.pitch;
    float* above = first - (v.border - k) * v.pitch;
    const float* top = first + k * v.pitch;
    float* below = first + (v.height + k) * v.pitch;
    for (int64_t i = 0; i < v.width * kPixel; i += kPixel) {
      std::memcpy(above + i + Images, last + i, (kPixel - Images) * 4);
      std::memcpy(below + i, top + i + Images, (kPixel - Images) * 4);
    }
  }
}

// around one channel whose pixels are written: zeros, and between parts what the neighbour holds
static void close_edges(const View& v, int64_t channel, int64_t parts) {
  if (v.border == 0) return;
  float* first = v.at(0, channel);
  const int64_t gap = v.border * kPixel;
  clear(first - v.border * v.pitch - gap, v.border * v.pitch + gap);
  for (int64_t r = 0; r < v.height; ++r) clear(first + r * v.pitch + v.width * kPixel, gap);
  clear(first + v.height * v.pitch, v.border * v.pitch);
  switch (parts) {
    case 2: return exchange<8>(v, first);
    case 4: return exchange<4>(v, first);
    case 8: return exchange<2>(v, first);
  }
}

// --- in and out

// dense (NCHW) images to lanes and back; a row of 16 images is a matrix to be turned
static void enter(const View& from, const View& to, int64_t images, int64_t channels, int64_t parts, int threads) {
  const int64_t lanes = kPixel / parts, rows = to.height;
  parallel(channels, useful_threads(threads, kTouch * static_cast<double>(channels * rows * to.pitch)), [&](int64_t c) {
    for (int64_t r = 0; r < rows; ++r) {
      float* row = to.at(0, c) + r * to.pitch;
      if (images < lanes) clear(row, to.width * kPixel);
      for (int64_t part = 0; part < parts; ++part)
        transpose(from.at(0, c) + (part * rows + r) * from.pitch, images, to.width, from.image, row + part * lanes, kPixel);
    }
    close_edges(to, c, parts);
  });
}
static void leave(const View& from, const View& to, int64_t images, int64_t channels, int64_t parts, int threads) {
  const int64_t lanes = kPixel / parts, rows = from.height;
  parallel(channels, useful_threads(threads, kTouch * static_cast<double>(channels * rows * from.pitch)), [&](int64_t c) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t part = 0; part < parts; ++part)
        transpose(from.at(0, c) + r * from.pitch + part * lanes, from.width, images, kPixel,
                  to.at(0, c) + (part * rows + r) * to.pitch, to.image);
  });
}

// --- convolution

// pixels [begin, end) of one output row, all rows of a group
static void lanes_panel(const Conv& c, const Rows& w, int64_t row, int64_t group, int64_t begin, int64_t end,
                        float* partial) {
  const int64_t step = c.cols.stride;
  const int units = static_cast<int>(c.group_rows() / c.h->block), from = static_cast<int>(group) * units;
  const float* x = c.in.at(0, group * c.h->channels) + (row * c.rows.stride - c.rows.pad) * c.in.pitch +
                   (begin * step - c.cols.pad) * kPixel;
  float* y = c.out.at(0, 0) + row * c.out.pitch + begin * kPixel;
  Rows here = w;
  const auto run = [&](int64_t vector, int64_t vectors, const float* source) {
    if (c.other.base) here.other = c.other.at(0, 0) + row * c.other.pitch + begin * kPixel + vector * V;
    const Plain out{y + vector * V, c.out.channel};
    if (V == kPixel && step == 2) any_panel<2>(here, vectors, from, from + units, source, partial, out);
    else any_panel(here, vectors, from, from + units, source, partial, out);
  };
  if (V == kPixel || step == 1) return panels(w, 0, (end - begin) * kPixelVectors, [&](int64_t first, int64_t last) {
    run(first, last - first, x + first * V * step);
  });
  for (int64_t p = 0; p < end - begin; ++p)
    panels(w, 0, kPixelVectors, [&](int64_t first, int64_t last) {
      run(p * kPixelVectors + first, last - first, x + p * step * kPixel + first * V);
    });
}

static void conv_rows(const Conv& c) {
  const int64_t rows = c.out.height, groups = c.h->groups;
  parallel(rows * groups, c.threads, [&](int64_t task) {
    float* partial = scratch.get<float>(kPartial, c.group_rows() * kWidest * V);
    Rows w = c.w;
    w.stride = c.offsets ? 1 : c.in.channel;
    if (c.offsets) w.offsets = c.offsets;
    w.other_stride = c.other.channel;
    lanes_panel(c, w, task % rows, task / rows, 0, c.out.width, partial);
  });
}

// N pixels of one row; taps are `apart` floats apart: where that is one pixel, neighbours share what is loaded
template <int K, int S, int N, bool Near>
static inline void depthwise_pixels(const float (&weight)[K][K], vf bias, const float* x, int64_t down, int64_t apart,
                                    int activation, float* y) {
  vf acc[N];
  SN_UNROLL for (int n = 0; n < N; ++n) acc[n] = bias;
  SN_UNROLL for (int i = 0; i < K; ++i) {
    const float* p = x + i * down;
    if constexpr (Near) {
      SN_UNROLL for (int l = 0; l < (N - 1) * S + K; ++l) {
        const vf in = load(p + l * kPixel);
        SN_UNROLL for (int k = 0; k < K; ++k)
          if (l >= k && (l - k) % S == 0 && (l - k) / S < N) acc[(l - k) / S] += weight[i][k] * in;
      }
    } else {
      SN_UNROLL for (int k = 0; k < K; ++k)
        SN_UNROLL for (int n = 0; n < N; ++n) acc[n] += weight[i][k] * load(p + k * apart + n * S * kPixel);
    }
  }
  SN_UNROLL for (int n = 0; n < N; ++n) store(y + n * kPixel, activate(acc[n], activation));
}

template <int K, int S, bool Near>
static __attribute__((noinline)) void depthwise_lanes(const Conv& c, int64_t channel, const float* taps) {
  constexpr int N = 4;
  float weight[K][K];
  std::memcpy(weight, taps, sizeof weight);
  const vf bias = splat(c.w.bias ? c.w.bias[channel] : 0.f);
  const int64_t down = c.rows.dilation * c.in.pitch, apart = c.cols.dilation * kPixel, width = c.out.width;
  const int activation = c.w.activation;
  for (int64_t r = 0; r < c.out.height; ++r)
    for (int64_t lane = 0; lane < kPixel; lane += V) {
      const float* x = c.in.at(0, channel) + (r * S - c.rows.pad) * c.in.pitch - c.cols.pad * kPixel + lane;
      float* y = c.out.at(0, channel) + r * c.out.pitch + lane;
      if (width < N) {
        for (int64_t j = 0; j < width; ++j)
          depthwise_pixels<K, S, 1, Near>(weight, bias, x + j * S * kPixel, down, apart, activation, y + j * kPixel);
        continue;
      }
      // the last pixels end with the row and may be computed a second time
      for (int64_t j = 0; j < width; j += N) {
        const int64_t at = std::min(j, width - N);
        depthwise_pixels<K, S, N, Near>(weight, bias, x + at * S * kPixel, down, apart, activation, y + at * kPixel);
      }
    }
}

template <int K>
static void depthwise_lanes(const Conv& c, int64_t channel) {
  float taps[K * K] = {};
  for (int32_t i = c.w.starts[channel]; i < c.w.starts[channel + 1]; ++i)
    taps[at<int32_t>(c.h, c.h->columns)[i]] = c.w.values[i];
  if (c.cols.stride == 2) return depthwise_lanes<K, 2, false>(c, channel, taps);
  c.cols.dilation == 1 ? depthwise_lanes<K, 1, true>(c, channel, taps) : depthwise_lanes<K, 1, false>(c, channel, taps);
}

static void conv_lanes(const Conv& c, int64_t parts) {
  const bool square = c.rows.stride == c.cols.stride && c.cols.stride <= 2;
  if (is_depthwise(c) && square)
    parallel(c.h->rows, c.threads, [&](int64_t row) {
      c.rows.taps == 3 ? depthwise_lanes<3>(c, row) : depthwise_lanes<5>(c, row);
    });
  else conv_rows(c);
  if (c.out.border) parallel(c.h->rows, c.threads, [&](int64_t row) { close_edges(c.out, row, parts); });
}

// --- pooling, sums, means

static void pool_lanes(const Pooling& p, int64_t channels, int64_t parts, int threads) {
  const double work = static_cast<double>(p.rows.taps * p.cols.taps * p.out.height * p.out.width * channels * kPixel);
  const vf none = splat(p.kind == kMax ? -std::numeric_limits<float>::infinity() : 0.f);
  parallel(channels, useful_threads(threads, kTouch * work), [&](int64_t c) {
    for (int64_t r = 0; r < p.out.height; ++r)
      for (int64_t j = 0; j < p.out.width; ++j) {
        const int64_t top = r * p.rows.stride - p.rows.pad, left = j * p.cols.stride - p.cols.pad;
        const int64_t first = std::max<int64_t>(0, top), last = std::min(p.in.height, top + p.rows.taps);
        const int64_t begin = std::max<int64_t>(0, left), end = std::min(p.in.width, left + p.cols.taps);
        const int64_t count = p.kind == kAverageAll ? p.rows.taps * p.cols.taps : (last - first) * (end - begin);
        for (int64_t lane = 0; lane < kPixel; lane += V) {
          vf acc = none;
          for (int64_t i = first; i < last; ++i)
            for (int64_t k = begin; k < end; ++k) {
              const vf in = load(p.in.at(0, c) + i * p.in.pitch + k * kPixel + lane);
              acc = p.kind == kMax ? (in != in || in > acc ? in : acc) : acc + in;
            }
          if (p.kind != kMax) acc /= splat(static_cast<float>(count));
          store(p.out.at(0, c) + r * p.out.pitch + j * kPixel + lane, acc);
        }
      }
    close_edges(p.out, c, parts);
  });
}

static void map_lanes(const Map& m, int64_t channels, int64_t parts, int threads) {
  const double work = static_cast<double>(m.out.height * m.out.width * channels * kPixel);
  parallel(channels, useful_threads(threads, kTouch * work), [&](int64_t c) {
    for (int64_t r = 0; r < m.out.height; ++r) {
      const float* x = m.in.at(0, c) + r * m.stride * m.in.pitch;
      const float* b = m.two ? m.other.at(0, c) + r * m.other.pitch : nullptr;
      float* y = m.out.at(0, c) + r * m.out.pitch;
      for (int64_t j = 0; j < m.out.width; ++j)
        for (int64_t lane = j * kPixel; lane < (j + 1) * kPixel; lane += V) {
          vf v = load(x + lane + j * (m.stride - 1) * kPixel);
          if (b) v += load(b + lane);
          store(y + lane, activate(v, m.activation));
        }
    }
    close_edges(m.out, c, parts);
  });
}

static void mean_lanes(const View& in, int64_t images, int64_t channels, int64_t parts, float* out, int threads) {
  const double work = static_cast<double>(in.height * in.width * channels * kPixel);
  parallel(channels, useful_threads(threads, kTouch * work), [&](int64_t c) {
    float sum[kPixel];
    for (int64_t lane = 0; lane < kPixel; lane += V) {
      vf acc = {};
      for (int64_t r = 0; r < in.height; ++r)
        for (int64_t j = 0; j < in.width; ++j) acc += load(in.at(0, c) + r * in.pitch + j * kPixel + lane);
      store(sum + lane, acc);
    }
    for (int64_t n = 0; n < images; ++n) {
      float total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sum[part * (kPixel / parts) + n];
      out[n * channels + c] = total / static_cast<float>(in.height * parts * in.width);
    }
  });
}

static void zero_lanes(const View& v, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t r = 0; r < v.height; ++r) clear(v.at(0, c) + r * v.pitch, v.width * kPixel);
    close_edges(v, c, 1);
  }
}

}  // namespace sn
