// Sparse linear of one or two tokens, zeros anywhere: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]).
//
// Entries of a row lie in eights: 16 bytes of values, and elsewhere 8 of columns: 16 bits for that of the first, then for
// each other 6 for how far it is behind the one before. Where that is too far, and at the end of a row, values are zero.
// A warp takes a row and its lanes an eight each; x lies in shared memory, tokens of a column beside each other, so that
// one load serves all of them. Sums of lanes are added in a fixed order: bit-equal in every run.
//
// Given: COUNT (1 or 2 tokens), WARPS, U (eights that a lane asks for at once), BF16.

#include "common.cuh"

#if COUNT == 1
typedef float Tokens;
DEVICE void add(float (&sum)[COUNT], float w, Tokens x) { sum[0] += w * x; }
#else
typedef u32 Tokens;
DEVICE void add(float (&sum)[COUNT], float w, Tokens x) {
  sum[0] += w * widened(x & 0xffff);
  sum[1] += w * widened(x >> 16);
}
#endif

DEVICE uint2 load_columns(const u32* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
DEVICE void add_two(float (&sum)[COUNT], u32 values, const Tokens* x, u32 first, u32 second) {
  add(sum, widened(values & 0xffff), x[first]);
  add(sum, widened(values >> 16), x[second]);
}
DEVICE void add_eight(float (&sum)[COUNT], uint4 values, uint2 columns, const Tokens* x) {
  const u32 a = columns.x & 0xffff, b = a + (columns.x >> 16 & 63), c = b + (columns.x >> 22 & 63), d = c + (columns.y & 63);
  const u32 e = d + (columns.y >> 6 & 63), f = e + (columns.y >> 12 & 63), g = f + (columns.y >> 18 & 63);
  add_two(sum, values.x, x, a, b);
  add_two(sum, values.y, x, c, d);
  add_two(sum, values.z, x, e, f);
  add_two(sum, values.w, x, g, g + (columns.y >> 24 & 63));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
entries(const u32* list, const int* starts, const u16* x, const float* bias, u16* y, int eights, int channels, int rows,
        int activation) {
  extern __shared__ Tokens given[];
  const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
  const u32* places = list + 4ll * eights;
  let_next_begin();
  int at = 0, end = 0;
  uint4 values[U];
  uint2 columns[U];
  const auto ask = [&]() {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = at + u * 32 + lane;
      values[u] = i < end ? load_weight(list + 4ll * i) : make_uint4(0, 0, 0, 0);
      columns[u] = i < end ? load_columns(places + 2ll * i) : make_uint2(0, 0);
    }
  };
  if (row < rows) at = starts[row], end = starts[row + 1];
  ask();
  wait_for_input();
  for (int i = threadIdx.x; i < channels; i += 32 * WARPS) {
#if COUNT == 1
    given[i] = widened(x[i]);
#else
    given[i] = x[i] | (u32)x[channels + i] << 16;
#endif
  }
  __syncthreads();
  if (row >= rows) return;
  float sum[COUNT] = {};
  while (at < end) {
    uint4 now[U];
    uint2 where[U];
#pragma unroll
    for (int u = 0; u < U; ++u) now[u] = values[u], where[u] = columns[u];
    at += U * 32;
    ask();
#pragma unroll
    for (int u = 0; u < U; ++u) add_eight(sum, now[u], where[u], given);
  }
#pragma unroll
  for (int t = 0; t < COUNT; ++t) {
#pragma unroll
    for (int far = 16; far; far /= 2) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], far);
    if (lane == 0) y[(long long)t * rows + row] = rounded(activate(sum[t] + (bias ? bias[row] : 0.f), activation));
  }
}
