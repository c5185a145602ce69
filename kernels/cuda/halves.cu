// Sparse linear of many tokens on compute capability 9.0: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]), of w two of every
// four along a row.
//
// As hopper.cu, but that all lines of tiles are alike: a thread block takes one tile of every so many. wgmma.sp multiplies 64
// rows by 32 columns of which half are there; which ones says a word of each lane for 64 columns, which comes beside them.
//
// A word: eight times four bits, the places of two columns among four; of lane l for its warp's 16 rows: of row l / 4 for
// columns (l % 4) * 16 and on in the lower half, of the row 8 on in the upper.
//
// Given: STAGES, BIAS (whether there is one), ACT (activation), BF16.

#define W_LINE 64
#define K_BYTES 1024
#define PIECE 32
#include "hopper.cuh"

DEVICE void load_words(u32 to, const u32* from, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "n"(K_BYTES), "r"(barrier) : "memory");
}

constexpr int BESIDE = PIECES / 4;  // pieces that are written beside one step

extern "C" __global__ void __launch_bounds__(THREADS, 1)
halves(const __grid_constant__ Map xs, const __grid_constant__ Map ws, const __grid_constant__ Map ys, const u32* kinds,
       const float* bias, int lines, int tiles, int steps) {
  extern __shared__ uint4 memory[];
  const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int all = lines * tiles;
  begin(base);
  int stage = 0;
  u32 phase = 0;
  const auto advance = [&]() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  };
  if (warp >= WARPS) {
    take_few_registers();
    if (warp > WARPS || lane > 0) return;
    const auto load_w = [&](int row, int step, int to, u32 full) {
      load(to + X_BYTES, ws, step * (STEP / 2), row, full);
      load_words(to + X_BYTES + W_BYTES, kinds + ((long long)row / ROWS * steps + step) * (K_BYTES / 4), full);
    };
    int ahead = min(STAGES, steps);  // whose w is asked for before x is there
    for (int s = 0; s < ahead; ++s) load_w(blockIdx.x % lines * ROWS, s, base + s * STAGE, base + FULL + 8 * s);
    wait_for_input();
    for (int tile = blockIdx.x; tile < all; tile += gridDim.x) {
      const int row = tile % lines * ROWS, token = tile / lines * TOKENS;
      for (int step = 0; step < steps; ++step, advance()) {
        const u32 full = base + FULL + 8 * stage, to = base + stage * STAGE;
        wait(base + EMPTY + 8 * stage, phase ^ 1);
        expect(full, STAGE);
        if (ahead-- <= 0) load_w(row, step, to, full);
        load(to, xs, step * STEP, token, full);
      }
    }
    return;
  }
  take_many_registers();
  wait_for_input();
  const int part = warp / 4, mine = part * 64 + warp % 4 * 16 + lane / 4;  // row, and that 8 on
  const u32 staged = base + STAGES * STAGE + part * 2 * Y_BYTES;
  Written sums;
  for (int tile = blockIdx.x; tile < all; tile += gridDim.x) {
    const int row = tile % lines * ROWS, first = tile / lines * TOKENS;
    const float low = BIAS ? bias[row + mine] : 0.f, high = BIAS ? bias[row + mine + 8] : 0.f;
    float c[128];
    u32 before = 0;
    const auto multiply = [&](int step) {
      const u32 at = base + stage * STAGE;
      wait(base + FULL + 8 * stage, phase);
      u32 now;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(now) : "r"(at + X_BYTES + W_BYTES + 4 * (warp * 32 + lane)));
      const u64 x = operand<LINE>(at), w = operand<W_LINE>(at + X_BYTES + part * 64 * W_LINE);
      begin_products();
      multiply_halves<0>(c, w, x, now, step);
      multiply_halves<1>(c, w + 2, x + 4, now, 1);
      end_products();
      wait_for_products<1>();
      if (step) release(before);
      before = base + EMPTY + 8 * stage;
      advance();
    };
#pragma unroll
    for (int step = 0; step < PIECES / BESIDE; ++step) {
      multiply(step);
      if (sums.token >= 0) {
#pragma unroll
        for (int i = 0; i < BESIDE; ++i) write(sums, step * BESIDE + i, ys, staged, part);
      }
    }
    for (int step = PIECES / BESIDE; step < steps; ++step) multiply(step);
    wait_for_products<0>();
    release(before);
    keep(sums, c, low, high, row + part * 64, first);
  }
  if (sums.token >= 0) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) write(sums, piece, ys, staged, part);
  }
  if (threadIdx.x % 128 == 0) wait_until_read<0>();
}
