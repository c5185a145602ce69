// The one core of linear, 1x1 and KxK: a panel of N vectors of pixels (or samples) times all rows of a
// packed weight. A non-zero is (weight, offset): broadcast the weight, N multiply-adds from memory.
// Every output adds its non-zeros in storage order, whatever the panel and the thread: bit-equal.
#pragma once
#include <type_traits>

#include "blob.h"
#include "simd.h"
#include "threads.h"

namespace sn {

struct Rows {
  const int32_t* starts;   // [chunks][units] + 1, a unit is `block` rows
  const int32_t* offsets;  // of an entry's activations, times stride
  const float* values;     // [entries][block]
  const float* bias;       // by row, or null
  int64_t stride;
  int chunks, units, block, activation;
  const float* other;      // added to the sums, or null; rows are other_stride apart
  int64_t other_stride;
  const int32_t* order;    // the row at each place; null: its number
};

static inline int64_t row_at(const int32_t* order, int place) { return order ? order[place] : place; }

// values as float32; those of bfloat16 are widened, which costs little beside what is done with them
static inline const float* values_of(const Header& h) {
  if (h.dtype == kFloat32) return at<float>(&h, h.values);
  const int64_t count = static_cast<int64_t>(h.entries) * h.block;
  float* wide = scratch.get<float>(kValues, count);
  widen(at<uint16_t>(&h, h.values), count, wide);
  return wide;
}

static inline Rows rows_of(const Header& h, const float* bias, int activation) {
  return {at<int32_t>(&h, h.starts), at<int32_t>(&h, h.columns), values_of(h), bias, 1,
          h.chunks, h.rows / h.block, h.block, activation, nullptr, 0, order_of(h)};
}

// sums lie as their inputs do
struct Plain {
  float* y;
  int64_t channel;
  static constexpr bool kAtOnce = true;
  void one(int64_t row, int v, vf sum) const { store(y + row * channel + v * V, sum); }
};

template <int R, int N>
using Tile = vf[R][N];

template <int R, int N>
static inline void open(Tile<R, N>& acc, const Rows& w, int chunk, int place, const float* partial) {
  SN_UNROLL for (int r = 0; r < R; ++r) {
    const vf bias = splat(w.bias ? w.bias[row_at(w.order, place + r)] : 0.f);
    SN_UNROLL for (int v = 0; v < N; ++v) acc[r][v] = chunk ? load(partial + (r * N + v) * V) : bias;
  }
  if (chunk || !w.other) return;
  SN_UNROLL for (int r = 0; r < R; ++r)
    SN_UNROLL for (int v = 0; v < N; ++v) acc[r][v] += load(w.other + row_at(w.order, place + r) * w.other_stride + v * V);
}

// the slow way out: sums that need an activation, or whose lanes scatter
template <class Store>
static __attribute__((noinline)) void finish(int activation, const int32_t* order, int place, int rows, int vectors,
                                             float* sums, const Store out) {
  if (activation) activate_all(sums, rows * vectors, activation);
  for (int r = 0; r < rows; ++r, sums += vectors * V)
    for (int v = 0; v < vectors; ++v) out.one(row_at(order, place + r), v, load(sums + v * V));
}

// A: what is done to sums on the way out, known ahead; kOther: asked for here
enum : int { kOther = kActivations };

template <int A, int R, int N, class Store>
static inline void close(Tile<R, N>& acc, const Rows& w, int chunk, int place, float* partial, const Store& out) {
  const bool last = chunk + 1 == w.chunks;
  if (A != kOther && last) {
    SN_UNROLL for (int r = 0; r < R; ++r)
      SN_UNROLL for (int v = 0; v < N; ++v) out.one(row_at(w.order, place + r), v, activate(acc[r][v], A));
    return;
  }
  SN_UNROLL for (int r = 0; r < R; ++r)
    SN_UNROLL for (int v = 0; v < N; ++v) store(partial + (r * N + v) * V, acc[r][v]);
  if (last) finish(w.activation, w.order, place, R, N, partial, out);
}

// S: the vectors of a panel lie every S-th
template <int S, int N>
static inline void add(vf (&acc)[N], const Rows& w, int64_t i, const float* x) {
  const float* p = x + w.offsets[i] * w.stride;
  const vf value = splat(w.values[i]);
  SN_UNROLL for (int v = 0; v < N; ++v) acc[v] += value * load(p + v * V * S);
}

// R single rows at a time: their chains of additions overlap
template <int S, int R, int N>
static inline void add_rows(Tile<R, N>& acc, const Rows& w, const int32_t* start, const float* x) {
  int32_t common = start[1] - start[0];
  for (int r = 1; r < R; ++r) common = std::min(common, start[r + 1] - start[r]);
  for (int32_t i = 0; i < common; ++i)
    SN_UNROLL for (int r = 0; r < R; ++r) add<S>(acc[r], w, start[r] + i, x);
  if constexpr (R > 1)
    SN_UNROLL for (int r = 0; r < R; ++r)
      for (int32_t i = start[r] + common; i < start[r + 1]; ++i) add<S>(acc[r], w, i, x);
}

// four rows that share their columns: an activation is loaded once for four multiply-adds
template <int S, int N>
static inline void add_blocks(Tile<4, N>& acc, const Rows& w, const int32_t* start, const float* x) {
  for (int64_t i = start[0]; i < start[1]; ++i) {
    const float* p = x + w.offsets[i] * w.stride;
    vf in[N];
    SN_UNROLL for (int v = 0; v < N; ++v) in[v] = load(p + v * V * S);
    SN_UNROLL for (int r = 0; r < 4; ++r) {
      const vf value = splat(w.values[4 * i + r]);
      SN_UNROLL for (int v = 0; v < N; ++v) acc[r][v] += value * in[v];
    }
  }
}

template <bool Blocks, int R, int N, int A, int S, class Store>
static inline __attribute__((always_inline)) void unit_rows(const Rows& w, int chunk, int unit, int place,
                                                            const float* x, float* partial, const Store& out) {
  Tile<R, N> acc;
  const int32_t* start = w.starts + static_cast<int64_t>(chunk) * w.units + unit;
  open<R, N>(acc, w, chunk, place, partial);
  if constexpr (Blocks) add_blocks<S>(acc, w, start, x);
  else add_rows<S>(acc, w, start, x);
  close<A>(acc, w, chunk, place, partial, out);
}

// units [from, to) on one panel; partial: room for (to - from) * block * N vectors
template <bool Blocks, int N, int A, int S, class Store>
static void panel(const Rows& rows, int from, int to, const float* x, float* partial, const Store store_) {
  // copied into registers, since what is stored might change the original; of blocks there is no room
  std::conditional_t<Blocks, const Rows&, const Rows> w = rows;
  const Store out = store_;
  constexpr int R = Blocks ? 4 : N == 1 ? 4 : N <= 3 ? 2 : 1;
  constexpr int units = Blocks ? 1 : R;
  for (int chunk = 0; chunk < w.chunks; ++chunk) {
    float* part = partial;
    int unit = from;
    for (; unit + units <= to; unit += units, part += R * N * V)
      unit_rows<Blocks, R, N, A, S>(w, chunk, unit, Blocks ? 4 * unit : unit, x, part, out);
    if constexpr (!Blocks && R > 1)
      for (; unit < to; ++unit, part += N * V) unit_rows<false, 1, N, A, S>(w, chunk, unit, unit, x, part, out);
  }
}

constexpr int kWidest = 8;        // vectors of a panel of single rows
constexpr int kWidestBlocks = V == 16 ? 4 : 2;  // and of blocks: 4 * N accumulators

static inline int widest(const Rows& w) { return w.block == 4 ? kWidestBlocks : kWidest; }

template <int A, int S, class Store>
static void any_width(const Rows& w, int64_t vectors, int from, int to, const float* x, float* partial,
                      const Store& out) {
#define SN_CASE(B, N) \
  case N: return panel<B, N, A, S>(w, from, to, x, partial, out);
  if (w.block == 4) {
    switch (vectors) { SN_CASE(true, 1) SN_CASE(true, 2)
#if SN_LANES == 16
      SN_CASE(true, 3) SN_CASE(true, 4)
#endif
    }
  }
  switch (vectors) {
    SN_CASE(false, 1) SN_CASE(false, 2) SN_CASE(false, 3) SN_CASE(false, 4)
    SN_CASE(false, 5) SN_CASE(false, 6) SN_CASE(false, 7) SN_CASE(false, 8)
  }
#undef SN_CASE
}

template <int S = 1, class Store>
static void any_panel(const Rows& w, int64_t vectors, int from, int to, const float* x, float* partial,
                      const Store& out) {
  if constexpr (Store::kAtOnce && S == 1) switch (w.activation) {
      case kNone: return any_width<kNone, S>(w, vectors, from, to, x, partial, out);
      case kRelu: return any_width<kRelu, S>(w, vectors, from, to, x, partial, out);
      case kRelu6: return any_width<kRelu6, S>(w, vectors, from, to, x, partial, out);
    }
  any_width<kOther, S>(w, vectors, from, to, x, partial, out);
}

// run(begin, end) for vectors [first, last) in even panels
template <class Run>
static void panels(const Rows& w, int64_t first, int64_t last, const Run& run) {
  const int64_t count = last - first, parts = (count + widest(w) - 1) / widest(w);
  for (int64_t i = 0; i < parts; ++i) run(first + count * i / parts, first + count * (i + 1) / parts);
}

}  // namespace sn
