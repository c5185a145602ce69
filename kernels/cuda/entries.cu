// Sparse linear of one or two tokens, zeros anywhere: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]).
//
// An entry is four bytes: a column below, a value above. A warp takes a row and its lanes four entries each; x lies in
// shared memory, tokens of a column beside each other, so that one load serves all of them. Sums of lanes are added in
// a fixed order: bit-equal in every run.
//
// Given: COUNT (1 or 2 tokens), WARPS, U (loads of four entries that a lane asks for at once), BF16.

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

DEVICE void add_entry(float (&sum)[COUNT], u32 entry, const Tokens* x) { add(sum, widened(entry >> 16), x[entry & 0xffff]); }

extern "C" __global__ void __launch_bounds__(32 * WARPS)
entries(const u32* list, const int* starts, const u16* x, const float* bias, u16* y, int channels, int rows,
        int activation) {
  extern __shared__ Tokens given[];
  const int lane = threadIdx.x % 32, row = blockIdx.x * WARPS + threadIdx.x / 32;
  let_next_begin();
  int at = 0, end = 0;
  uint4 next[U];
  const auto ask = [&]() {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int i = at + (u * 32 + lane) * 4;
      next[u] = i < end ? load_weight(list + i) : make_uint4(0, 0, 0, 0);
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
#pragma unroll
    for (int u = 0; u < U; ++u) now[u] = next[u];
    at += U * 128;
    ask();
#pragma unroll
    for (int u = 0; u < U; ++u) {
      add_entry(sum, now[u].x, given);
      add_entry(sum, now[u].y, given);
      add_entry(sum, now[u].z, given);
      add_entry(sum, now[u].w, given);
    }
  }
#pragma unroll
  for (int t = 0; t < COUNT; ++t) {
#pragma unroll
    for (int far = 16; far; far /= 2) sum[t] += __shfl_xor_sync(0xffffffffu, sum[t], far);
    if (lane == 0) y[(long long)t * rows + row] = rounded(activate(sum[t] + (bias ? bias[row] : 0.f), activation));
  }
}
