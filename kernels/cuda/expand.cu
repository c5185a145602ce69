// Sparse linear of up to 32 tokens, zeros anywhere: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]).
//
// w lies in tiles of 16 rows and 32 columns: for each lane of a warp a mask of its sixteen weights, and what they are
// where they are not zero, lane by lane. A warp brings the weights of its next tiles into shared memory while it
// expands those of the last ones into the registers of mma.m16n8k16. A thread block owns 16 * MT rows; its warps share
// the columns, and their sums are added in the order of the warps: bit-equal in every run.
//
// Given: MT, NT (tokens / 8), WARPS, BF16.

#include "common.cuh"

constexpr int TILE = 1024;  // bytes of a tile without zeros

DEVICE u32 load_mask(const u16* p) {
  u16 v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
// bytes [0, size) of a tile, 16 a lane
DEVICE void bring(u32 to, const char* from, int size, int lane) {
#pragma unroll
  for (int part = 0; part < TILE; part += 512)
    if (part + lane * 16 < size)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + part + lane * 16), "l"(from + part + lane * 16));
}
DEVICE void end_group() { asm volatile("cp.async.commit_group;"); }
// all groups but the last have arrived
DEVICE void wait_for_group() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// how many weights the lanes before this one have
DEVICE int before(u32 mask, int lane) {
  int count = __popc(mask), total = count;
#pragma unroll
  for (int far = 1; far < 32; far *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, total, far);
    if (lane >= far) total += other;
  }
  return total - count;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
expand(const u16* masks, const int* starts, const char* kept, const u16* x, const float* bias, u16* y, int tokens,
       int channels, int rows, int activation) {
  extern __shared__ __align__(16) char memory[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const int row = blockIdx.x * ROWS, chunks = channels / 32;
  const int first = chunks * warp / WARPS, last = chunks * (warp + 1) / WARPS;
  char* stage = memory + warp * 2 * MT * TILE;
  const u32 stage_at = (u32)__cvta_generic_to_shared(stage);
  let_next_begin();
  u32 mask[MT], next_mask[MT], seen[MT];
  int begin[MT], end[MT];
  // where the weights of a chunk lie, and their masks: asked for one chunk before its weights are
  const auto look = [&](int chunk) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const long long tile = (long long)(row / 16 + m) * chunks + min(chunk, last - 1);
      begin[m] = starts[tile], end[m] = starts[tile + 1];
      seen[m] = load_mask(masks + tile * 32 + lane);
    }
  };
  const auto ask = [&](int chunk) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
      if (chunk < last)
        bring(stage_at + (chunk % 2 * MT + m) * TILE, kept + (long long)begin[m] * 2, (end[m] - begin[m]) * 2, lane);
    end_group();
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
  const auto move_masks = [&]() {
#pragma unroll
    for (int m = 0; m < MT; ++m) mask[m] = next_mask[m], next_mask[m] = seen[m];
  };
  if (first < last) {
    look(first);
    ask(first);
    move_masks();
    look(first + 1);
  }
  wait_for_input();
  load_x(first);
  for (int chunk = first; chunk < last; ++chunk) {
    move_masks();
#pragma unroll
    for (int n = 0; n < NT; ++n) in[n] = next_in[n];
    ask(chunk + 1);
    look(chunk + 2);
    load_x(chunk + 1);
    wait_for_group();
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const u16* p = (const u16*)(stage + (chunk % 2 * MT + m) * TILE) + before(mask[m], lane);
      u32 w[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        u32 low = 0, high = 0;
        if (mask[m] >> (2 * j) & 1) low = *p++;
        if (mask[m] >> (2 * j + 1) & 1) high = *p++;
        w[j] = low | high << 16;
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        multiply(sum[m][n], w[0], w[4], w[1], w[5], in[n].x, in[n].y);
        multiply(sum[m][n], w[2], w[6], w[3], w[7], in[n].z, in[n].w);
      }
    }
    __syncwarp();
  }
  __syncthreads();
  float(*part)[8 * NT][PITCH] = (float(*)[8 * NT][PITCH])memory;
  add_warps(part, sum, bias, y, row, 0, tokens, rows, activation);
}
