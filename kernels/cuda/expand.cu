// Sparse linear of up to 32 tokens, zeros anywhere: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]).
//
// w lies in tiles of 16 rows and 32 columns, each a list of entries: a place below, a value above. A warp scatters the
// entries of a tile into shared memory, from where each lane takes its sixteen weights for mma.m16n8k16, while those of
// the next tiles are on their way. A thread block owns 16 * MT rows; its warps share the columns, and their sums are
// added in the order of the warps: bit-equal in every run.
//
// Given: MT, NT (tokens / 8), WARPS, AHEAD (loads of 32 entries of a tile that are asked for ahead), BF16.

#include "common.cuh"

constexpr int TILE = 1024, DUMMY = TILE, ROOM = TILE + 16;  // bytes of a tile; where an entry goes that is none

DEVICE u32 load_entry(const u32* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
DEVICE void scatter(char* tile, u32 entry) { *(u16*)(tile + (entry & 0xffff)) = (u16)(entry >> 16); }

extern "C" __global__ void __launch_bounds__(32 * WARPS)
expand(const u32* list, const int* starts, const u16* x, const float* bias, u16* y, int tokens, int channels, int rows,
       int activation) {
  extern __shared__ __align__(16) char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const int row = blockIdx.x * ROWS, chunks = channels / 32;
  const int first = chunks * warp / WARPS, last = chunks * (warp + 1) / WARPS;
  char* room = memory + warp * 2 * ROOM;
  let_next_begin();
  for (int i = lane; i < 2 * ROOM / 16; i += 32) ((uint4*)room)[i] = make_uint4(0, 0, 0, 0);
  int begin[MT], end[MT], next_begin[MT], next_end[MT];
  u32 next[MT][AHEAD];
  // where the entries of a chunk lie: asked for one chunk before they are
  const auto look = [&](int chunk) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const int* p = starts + (long long)(row / 16 + m) * chunks + min(chunk, last - 1);
      next_begin[m] = p[0], next_end[m] = chunk < last ? p[1] : p[0];
    }
  };
  const auto ask = [&]() {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) {
        const int i = next_begin[m] + k * 32 + lane;
        next[m][k] = i < next_end[m] ? load_entry(list + i) : DUMMY;
      }
  };
  float sum[MT][NT][4] = {};
  uint4 in[NT], next_in[NT];
  const auto load_x = [&](int chunk) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = n * 8 + group;
      const u16* p = x + (long long)token * channels + chunk * 32 + quad * 8;
      next_in[n] = token < tokens && chunk < last ? *(const uint4*)p : make_uint4(0, 0, 0, 0);
    }
  };
  if (first < last) look(first), ask();
  wait_for_input();
  load_x(first);
  __syncwarp();
  for (int chunk = first; chunk < last; ++chunk) {
    u32 now[MT][AHEAD];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      begin[m] = next_begin[m], end[m] = next_end[m];
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) now[m][k] = next[m][k];
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) in[n] = next_in[n];
    load_x(chunk + 1);
    look(chunk + 1);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      char* tile = room + m % 2 * ROOM;
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) scatter(tile, now[m][k]);
      for (int i = begin[m] + AHEAD * 32 + lane; i < end[m]; i += 32) scatter(tile, load_entry(list + i));
      __syncwarp();
      uint4* mine = (uint4*)tile + lane;
      const uint4 low = mine[0], high = mine[32], none = make_uint4(0, 0, 0, 0);
      mine[0] = none, mine[32] = none;
      if (m == 0) ask();
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        multiply(sum[m][n], low.x, high.x, low.y, high.y, in[n].x, in[n].y);
        multiply(sum[m][n], low.z, high.z, low.w, high.w, in[n].z, in[n].w);
      }
    }
    __syncwarp();
  }
  __syncthreads();
  add_warps((float(*)[8 * NT][PITCH])memory, sum, bias, y, row, 0, tokens, rows, activation);
}
