// Depthwise convolution of 3x3 and 5x5: of neighbouring outputs with channels beside each other (channels.h); of
// others, and of channels that fill no vector, row by row: a row of input is loaded once for all rows of output that it
// serves; columns outside are lanes that are not read, so that no borders are needed.
#pragma once
#include "channels.h"
#include "conv2d.h"
#include "rows.h"

namespace sn {

// How the taps of a row lie: of neighbouring outputs, the same but side by side and around each output, of every second
// one and side by side, or anyhow.
enum Taps : int { kFirst, kAround, kSecond, kAnyhow };

// Which lanes of the loads for one vector of outputs are real columns: one load for each tap; kSecond: one after another.
struct Under {
  Some load[5];
  Column<0> column[5];
};

struct Depthwise {
  View in, out;
  Axis rows, cols;
  const Under* under;  // by vector of outputs
  const float* zeros;  // a row outside
};

static void find_under(const Axis& cols, bool second, Under* to) {
  for (int64_t j = 0; j < cols.out; j += V, ++to)
    for (int k = 0; k < cols.taps; ++k) {
      const int64_t shift = k * (second ? V : cols.dilation) - cols.pad, start = j * cols.stride + shift;
      to->load[k] = some(-start, cols.in - start);
      to->column[k] = columns<0>(j, k * cols.dilation - cols.pad, cols.stride, cols.in, cols.out);
    }
}

// in[k]: what tap k reads of a row
template <int M, int K>
static inline void load_row(vf (&in)[K], const float* p, const Axis& cols, const Under& u) {
  if constexpr (M == kSecond) {
    const vf a = load(p, u.load[0], vf{}), b = load(p + V, u.load[1], vf{}), c = load(p + 2 * V, u.load[2], vf{});
    const vf even = evens(a, b), odd = odds(a, b), after = evens(c, c);
    in[0] = even, in[1] = odd, in[2] = shifted<1>(even, after);
    if constexpr (K == 5) in[3] = shifted<1>(odd, odds(c, c)), in[4] = shifted<2>(even, after);
  } else {
    SN_UNROLL for (int k = 0; k < K; ++k) {
      const float* at = p + k * cols.dilation;
      in[k] = M == kFirst ? load(at, u.load[k], vf{}) : load<0>(at, cols.stride, u.column[k], vf{});
    }
  }
}

// One vector of R rows of outputs, column of taps by column: 25 weights do not fit into registers. Lanes are left out
// where columns may be outside, which costs as much as a multiply-add: those before the middle of the taps on the left
// (B), those behind it on the right (E). Of others, lanes beyond a row read what lies there, and nobody stores them.
template <int M, bool B, bool E, int R, int K>
static inline __attribute__((always_inline)) void around(const Depthwise& d, const float* taps, const Under& u,
                                                         const float* const* from, int64_t j, vf (&acc)[R]) {
  SN_UNROLL for (int l = 0; l < K; ++l) {
    asm("" : "+r"(taps));  // else all weights are kept, and sums are not
    vf weight[K];
    SN_UNROLL for (int k = 0; k < K; ++k) weight[k] = splat(taps[k * K + l]);
    SN_UNROLL for (int k = 0; k < R - 1 + K; ++k) {
      const float* p = from[k] + j + l * (M == kAround ? 1 : d.cols.dilation);
      const bool some = M != kAround || (B && l < K / 2) || (E && l > K / 2);
      vf in = some ? load(p, u.load[l], vf{}) : load(p);
      SN_IN_REGISTER(in);
      SN_UNROLL for (int r = 0; r < R; ++r)
        if (k - r >= 0 && k - r < K) acc[r] += weight[k - r] * in;
    }
  }
}

// R output rows at a time, whose taps are T rows apart; between `low` and `high`
template <int M, int R, int T, int K>
static __attribute__((noinline)) void depthwise_plane(const Depthwise& how, const float* taps, float bias, vf low,
                                                      vf high, const float* x, float* y) {
  const Depthwise d = how;  // in registers, as are the weights: nothing that is stored can change them
  float weight[K][K];
  std::memcpy(weight, taps, sizeof weight);
  const int64_t step = T == 1 ? d.rows.dilation : 1;
  for (int64_t residue = 0; residue < step; ++residue) {
    const int64_t count = ceil_pos(d.rows.out - residue, step);
    for (int64_t i = 0; i < count; i += R) {
      // the last block ends with the plane and may compute some rows a second time
      const int64_t row = residue + std::min(i, count - R) * step;
      const float* from[(R - 1) * T + K];
      SN_UNROLL for (int k = 0; k < (R - 1) * T + K; ++k) {
        const int64_t source = d.rows.stride * row + d.rows.dilation * k - d.rows.pad;
        from[k] = (source >= 0 && source < d.rows.in ? x + source * d.in.pitch : d.zeros) - d.cols.pad;
      }
      float* to = y + row * d.out.pitch;
      for (int64_t j = 0; j < d.cols.out; j += V) {
        vf acc[R];
        SN_UNROLL for (int r = 0; r < R; ++r) acc[r] = splat(bias);
        const Under& u = d.under[j / V];
        if constexpr (M == kAround) {
          const bool begins = j == 0, ends = j + V + d.cols.pad > d.cols.in;
          if (begins && ends) around<M, true, true, R, K>(d, taps, u, from, j, acc);
          else if (begins) around<M, true, false, R, K>(d, taps, u, from, j, acc);
          else if (ends) around<M, false, true, R, K>(d, taps, u, from, j, acc);
          else around<M, false, false, R, K>(d, taps, u, from, j, acc);
        } else if constexpr (M == kFirst && K == 5) {
          around<M, true, true, R, K>(d, taps, u, from, j, acc);
        } else {
          SN_UNROLL for (int k = 0; k < (R - 1) * T + K; ++k) {
            vf in[K];
            load_row<M>(in, from[k] + j * d.cols.stride, d.cols, u);
            SN_UNROLL for (int l = 0; l < K; ++l)
              SN_UNROLL for (int r = 0; r < R; ++r)
                if (k - r * T >= 0 && k - r * T < K) acc[r] += weight[k - r * T][l] * in[l];
          }
        }
        const Some lanes = some(0, d.cols.out - j);
        SN_UNROLL for (int r = 0; r < R; ++r)
          store(to + r * step * d.out.pitch + j, lanes, vmin(vmax(acc[r], low), high));
      }
    }
  }
}

// beyond: whether there is a vector to read behind the plane
template <int K, class... Rest>
static void depthwise_plane(const Depthwise& d, bool beyond, const Rest&... rest) {
  const bool near = d.rows.dilation == 1 && d.cols.dilation == 1;
  const bool around = near && d.rows.stride == 1 && d.cols.stride == 1 && d.cols.pad == K / 2;
  // sixteen lanes hide masks behind the multiply-adds of nine weights that stay in registers
  if (around && beyond && d.rows.out >= 4 && (K == 5 || V < 16))
    return depthwise_plane<kAround, 4, 1, K>(d, rest...);
  if (d.rows.stride == 1 && d.cols.stride == 1)
    return d.rows.out >= 4 * d.rows.dilation ? depthwise_plane<kFirst, 4, 1, K>(d, rest...)
                                             : depthwise_plane<kFirst, 1, 1, K>(d, rest...);
  if (d.rows.stride == 2 && d.cols.stride == 2 && near && d.rows.out >= 4)
    return depthwise_plane<kSecond, 4, 2, K>(d, rest...);
  depthwise_plane<kAnyhow, 1, 0, K>(d, rest...);
}

static inline bool is_depthwise(const Conv& c) {
  const int64_t kernel = c.rows.taps;
  return c.h->channels == 1 && c.h->groups == c.h->rows && kernel == c.cols.taps && (kernel == 3 || kernel == 5);
}

static void activate_plane(const View& v, float* y, int activation) {
  for (int64_t r = 0; r < v.height; ++r, y += v.pitch)
    for (int64_t j = 0; j < v.width; j += V) {
      const Some lanes = some(0, v.width - j);
      store(y + j, lanes, activate(load(y + j, lanes, vf{}), activation));
    }
}

// channels from `begin` on
static void conv_planes(const Conv& c, int64_t begin) {
  const int64_t channels = c.h->rows - begin, taps = c.rows.taps * c.cols.taps;
  Under* under = scratch.get<Under>(kCall, ceil_pos(c.cols.out, V));
  find_under(c.cols, c.cols.stride == 2 && c.cols.dilation == 1, under);
  float* zeros = scratch.get<float>(kPadded, c.cols.in + V);
  clear(zeros, c.cols.in + V);
  const Depthwise d{c.in, c.out, c.rows, c.cols, under, zeros};
  const float infinity = std::numeric_limits<float>::infinity();
  const bool clamped = c.w.activation == kRelu || c.w.activation == kRelu6;
  const vf low = splat(clamped ? 0.f : -infinity), high = splat(c.w.activation == kRelu6 ? 6.f : infinity);
  parallel(c.images * channels, c.threads, [&](int64_t task) {
    const int64_t n = task / channels, row = begin + task % channels;
    const int32_t first = c.w.starts[row], last = c.w.starts[row + 1];
    const float* weight = c.w.values + first;
    float some_zero[25] = {};
    if (last - first < taps) {
      for (int32_t i = first; i < last; ++i) some_zero[c.w.offsets[i]] = c.w.values[i];
      weight = some_zero;
    }
    const float bias = c.w.bias ? c.w.bias[row] : 0.f;
    const float* x = c.in.at(n, row);
    float* y = c.out.at(n, row);
    const bool beyond = ((c.images - n) * c.h->rows - 1 - row) * c.rows.in * c.cols.in >= V + taps;
    c.rows.taps == 3 ? depthwise_plane<3>(d, beyond, weight, bias, low, high, x, y)
                     : depthwise_plane<5>(d, beyond, weight, bias, low, high, x, y);
    if (c.w.activation > kRelu6) activate_plane(c.out, y, c.w.activation);
    clear_around(c.out, n, row);
  });
}

static void conv_depthwise(const Conv& c) {
  const int64_t beside = channels_pay(c) ? c.h->rows / V * V : 0;
  if (beside) c.rows.taps == 3 ? conv_channels<3>(c, beside) : conv_channels<5>(c, beside);
  if (beside < c.h->rows) conv_planes(c, beside);
}

}  // namespace sn
