// Sparse linear of up to 32 tokens, zeros anywhere: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]).
//
// w lies in tiles of 16 * MT rows and 32 * KT columns, of each the pairs of neighbours in a row that are not both zero.
// A lane multiplies 32 pairs of a tile, eight in each mma.m16n8k16 of 32 columns; a word says which of them there are,
// and the others are zeros in registers. Tiles come into shared memory some steps ahead. A thread block owns a row of
// tiles; its warps share the columns, and their sums are added in the order of the warps: bit-equal in every run.
//
// A tile: which pairs each lane has (32 words), behind which word they begin (32 halves), then the pairs, lane by lane.
// Given: MT, NT (tokens / 8), WARPS, DEPTH (steps that are under way or in use), COPIES (of 512 bytes for a tile), BF16.

#include "common.cuh"

constexpr int KT = 4 / MT, HEAD = 192;

DEVICE void copy_if(bool real, u32 to, const void* from) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }" ::"r"(to),
               "l"(from), "r"((u32)real)
               : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
DEVICE void wait_for_oldest() { asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory"); }

extern "C" __global__ void __launch_bounds__(32 * WARPS)
expand(const uint4* list, const int* starts, const u16* x, const float* bias, u16* y, int tokens, int channels, int rows,
       int room, int activation) {
  extern __shared__ uint4 memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const int steps = (channels + 32 * KT - 1) / (32 * KT);
  const int first = steps * warp / WARPS, last = steps * (warp + 1) / WARPS;
  const u32 mine = (u32)__cvta_generic_to_shared(memory) + warp * DEPTH * room;
  let_next_begin();
  const int* at = starts + (long long)blockIdx.x * steps;
  int base = first, edges = at[min(base + lane, last)];  // where tiles begin from `base` on, a lane each
  const auto fetch = [&](int step, int stage) {
    if (step - base == 31) base = step, edges = at[min(base + lane, last)];
    const int begin = __shfl_sync(0xffffffffu, edges, step - base);
    const int count = __shfl_sync(0xffffffffu, edges, step - base + 1) - begin;
    const u32 to = mine + stage * room + lane * 16;
    const uint4* from = list + begin + lane;
#pragma unroll
    for (int i = 0; i < COPIES; ++i) copy_if(i * 32 + lane < count, to + i * 512, from + i * 32);
    commit();
  };
#pragma unroll
  for (int d = 0; d < DEPTH - 1; ++d) fetch(first + d, d);
  float sum[MT][NT][4] = {};
  wait_for_input();
  int stage = 0;
  for (int step = first; step < last; ++step) {
    uint4 in[KT][NT];
#pragma unroll
    for (int k = 0; k < KT; ++k)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int token = n * 8 + group, column = (step * KT + k) * 32 + quad * 8;
        const bool real = token < tokens && column < channels;
        in[k][n] = real ? *(const uint4*)(x + (long long)token * channels + column) : make_uint4(0, 0, 0, 0);
      }
    wait_for_oldest();
    __syncwarp();
    fetch(step + DEPTH - 1, stage == 0 ? DEPTH - 1 : stage - 1);
    const u32 tile = mine + stage * room;
    u32 kept, begin;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(kept) : "r"(tile + lane * 4));
    asm volatile("ld.shared.u16 %0, [%1];" : "=r"(begin) : "r"(tile + 128 + lane * 2));
    u32 place[2] = {tile + HEAD + begin * 4};
    place[1] = place[0] + __popc(kept & 0xffff) * 4;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      u32 w[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        w[e] = 0;
        if (kept & 1u << (8 * t + e))
          asm volatile("ld.shared.u32 %0, [%1]; add.u32 %1, %1, 4;" : "=r"(w[e]), "+r"(place[t / 2]));
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4 v = in[t % KT][n];
        multiply(sum[t / KT][n], w[0], w[4], w[1], w[5], v.x, v.y);
        multiply(sum[t / KT][n], w[2], w[6], w[3], w[7], v.z, v.w);
      }
    }
    stage = stage == DEPTH - 1 ? 0 : stage + 1;
  }
  __syncthreads();
  add_warps((float(*)[8 * NT][PITCH])memory, sum, bias, y, blockIdx.x * ROWS, 0, tokens, rows, activation);
}
