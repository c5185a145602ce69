// Sparse linear of few tokens: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]), w in blocks of BR x BC.
//
// A thread block owns 16 * MT rows of the output; its warps share the columns, 32 at a time, and their sums are added
// in the order of the warps: bit-equal in every run. Rows of w are the M of mma.m16n8k16, tokens the N. Within 32
// columns the order of k is free, so each lane takes eight columns that lie together: one load of 16 bytes, of w and of
// x. The first of w is asked for before the wait for the kernel before this one, which writes x.
//
// Given: MT, NT (tokens / 8), WARPS, U (chunks of 32 columns a warp asks for at once), BR, BC, BF16.

#include "common.cuh"

DEVICE uint4 load_tokens(const u16* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
extern "C" __global__ void __launch_bounds__(32 * WARPS)
few(const u16* values, const int* starts, const int* columns, const u16* x, const float* bias, u16* y, int tokens,
    int channels, int rows, int activation) {
  constexpr int PER_BLOCK = BC / 32;
  __shared__ float part[WARPS][8 * NT][PITCH];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const int row = blockIdx.x * ROWS, first_token = blockIdx.y * 8 * NT;
  let_next_begin();
  const int begin = starts[row / BR], chunks = (starts[row / BR + 1] - begin) * PER_BLOCK;
  const u16* mine = values + ((long long)begin * BR + row % BR + group) * BC + quad * 8;
  float sum[MT][NT][4] = {};
  bool waited = false;
  for (int base = warp * U; base < chunks; base += WARPS * U) {
    uint4 w[U][MT][2];
    int column[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int block = (base + u) / PER_BLOCK, side = (base + u) % PER_BLOCK;
      const bool real = base + u < chunks;
      const u16* p = mine + (long long)block * BR * BC + side * 32;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        w[u][m][0] = real ? load_weight(p + 16 * m * BC) : make_uint4(0, 0, 0, 0);
        w[u][m][1] = real ? load_weight(p + (16 * m + 8) * BC) : make_uint4(0, 0, 0, 0);
      }
      column[u] = real ? columns[begin + block] * BC + side * 32 + quad * 8 : 0;
    }
    if (!waited) wait_for_input(), waited = true;
    uint4 in[U][NT];
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int token = first_token + n * 8 + group;
        const bool real = token < tokens && base + u < chunks;
        in[u][n] = real ? load_tokens(x + (long long)token * channels + column[u]) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const uint4 a = w[u][m][0], b = w[u][m][1], v = in[u][n];
          multiply(sum[m][n], a.x, b.x, a.y, b.y, v.x, v.y);
          multiply(sum[m][n], a.z, b.z, a.w, b.w, v.z, v.w);
        }
  }
  if (!waited) wait_for_input();
  add_warps(part, sum, bias, y, row, first_token, tokens, rows, activation);
}
