// What one core can do at most: loops that only multiply and add, or only read.
#pragma once
#include "simd.h"

namespace sn {

constexpr int kChains = 12, kStreams = 8;  // sums that do not wait for each other

// about `count` multiply-adds
static float multiply_adds(int64_t count) {
  vf sum[kChains], factor, term;
  for (int i = 0; i < V; ++i) factor[i] = 1.f + 1e-7f * static_cast<float>(i), term[i] = 1e-7f * static_cast<float>(i);
  for (int k = 0; k < kChains; ++k) sum[k] = factor * static_cast<float>(k + 1);
  for (int64_t i = 0; i < count; i += kChains * V)
    SN_UNROLL for (int k = 0; k < kChains; ++k) sum[k] = sum[k] * factor + term;
  for (int k = 1; k < kChains; ++k) sum[0] += sum[k];
  return sum[0][V - 1];
}

// `count` floats, a multiple of kStreams * V, so many times
static float reads(const float* p, int64_t count, int64_t times) {
  vf sum[kStreams] = {};
  for (int64_t t = 0; t < times; ++t)
    for (int64_t i = 0; i < count; i += kStreams * V)
      SN_UNROLL for (int k = 0; k < kStreams; ++k) sum[k] += load(p + i + k * V);
  for (int k = 1; k < kStreams; ++k) sum[0] += sum[k];
  return sum[0][V - 1];
}

}  // namespace sn
