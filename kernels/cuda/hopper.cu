// Sparse linear of many tokens on compute capability 9.0: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]), w in blocks of
// 128 x BC.
//
// A thread block takes tiles of 256 tokens and 128 rows in turn. Its ninth warp asks the copy engine for 64 columns of w
// and of x at a time, STAGES steps ahead, also of the next tile while one is written. Two groups of four warps multiply
// (wgmma), 64 rows of w (its M) by all tokens (its N) each, and give sums to the copy engine 64 tokens at a time, beside
// the first products of the next tile.
//
// Which tiles a thread block takes was planned ahead: a line of `plan` for each, of numbers that count all lines of the
// first tokens first, and -1 where they end. Sums have one order: bit-equal in every run.
//
// Given: BC, STAGES, BIAS (whether there is one), ACT (activation), BF16.

#define W_LINE 128
#define K_BYTES 0
#define PIECE 64
#include "hopper.cuh"

constexpr int SIDES = BC / STEP, AHEAD = 3;

struct Tile { int number, begin, end, column; };  // of a tile, its blocks, and a lane's of their columns

extern "C" __global__ void __launch_bounds__(THREADS, 1)
hopper(const __grid_constant__ Map xs, const __grid_constant__ Map ws, const __grid_constant__ Map ys, const int* plan,
       const int* starts, const int* columns, const float* bias, int lines, int waves) {
  extern __shared__ uint4 memory[];
  const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  plan += blockIdx.x * waves;
  begin(base);
  // what lists say of a tile is asked for some tiles ahead, each thing once that is here which it depends on
  Tile next[AHEAD + 1];
  const auto number = [&](Tile& tile, int wave) { tile.number = wave < waves ? plan[wave] : -1; };
  const auto bounds = [&](Tile& tile) {
    const int* at = starts + tile.number % lines;
    tile.begin = tile.number < 0 ? 0 : at[0], tile.end = tile.number < 0 ? 0 : at[1];
  };
  const auto list = [&](Tile& tile) {
    tile.column = tile.begin + lane < tile.end ? columns[tile.begin + lane] : 0;
  };
#pragma unroll
  for (int i = 0; i <= AHEAD; ++i) {
    number(next[i], i);
    if (i < AHEAD) bounds(next[i]);
  }
  const auto turn = [&](int wave) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) next[i] = next[i + 1];
    bounds(next[AHEAD - 1]), number(next[AHEAD], wave + AHEAD + 1);
  };
  int stage = 0;
  u32 phase = 0;
  const auto advance = [&]() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  };
  if (warp >= WARPS) {
    take_few_registers();
    if (warp > WARPS) return;
#pragma unroll
    for (int i = 0; i < AHEAD - 1; ++i) list(next[i]);
    int ahead = min(STAGES, (next[0].end - next[0].begin) * SIDES);  // steps whose w is asked for before x is there
    for (int s = 0; s < ahead && lane == 0; ++s)
      load(base + s * STAGE + X_BYTES, ws, s % SIDES * STEP, (next[0].begin + s / SIDES) * ROWS, base + FULL + 8 * s);
    wait_for_input();
    for (int wave = 0; next[0].number >= 0; turn(wave), list(next[AHEAD - 2]), ++wave) {
      const int token = next[0].number / lines * TOKENS;
      int held = next[0].column;
      for (int i = next[0].begin; i < next[0].end; ++i) {
        const int back = (i - next[0].begin) % 32;
        if (back == 0 && i != next[0].begin) held = i + lane < next[0].end ? columns[i + lane] : 0;
        const int from = __shfl_sync(0xffffffffu, held, back) * BC;
#pragma unroll
        for (int side = 0; side < SIDES; ++side, advance())
          if (lane == 0) {
            const u32 full = base + FULL + 8 * stage, to = base + stage * STAGE;
            wait(base + EMPTY + 8 * stage, phase ^ 1);
            expect(full, STAGE);
            if (ahead-- <= 0) load(to + X_BYTES, ws, side * STEP, i * ROWS, full);
            load(to, xs, from + side * STEP, token, full);
          }
        __syncwarp();
      }
    }
    return;
  }
  take_many_registers();
  wait_for_input();
  const int part = warp / 4, mine = part * 64 + warp % 4 * 16 + lane / 4;  // row, and that 8 on
  const u32 staged = base + STAGES * STAGE + part * 2 * Y_BYTES;
  Written sums;
  for (int wave = 0; next[0].number >= 0; turn(wave), ++wave) {
    const int row = next[0].number % lines * ROWS, first = next[0].number / lines * TOKENS;
    const int steps = (next[0].end - next[0].begin) * SIDES;
    const float low = BIAS ? bias[row + mine] : 0.f, high = BIAS ? bias[row + mine + 8] : 0.f;
    float c[128];
    if (steps == 0) {
#pragma unroll
      for (int i = 0; i < 128; ++i) c[i] = 0.f;
    }
    u32 before = 0;
    const auto multiply = [&](int step) {
      wait(base + FULL + 8 * stage, phase);
      const u32 at = base + stage * STAGE;
      const u64 x = operand<LINE>(at), w = operand<W_LINE>(at + X_BYTES + part * 64 * W_LINE);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_by_group(c, w + 2 * k, x + 2 * k, step + k);
      end_products();
      wait_for_products<1>();
      if (step) release(before);
      before = base + EMPTY + 8 * stage;
      advance();
    };
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      if (piece < steps) multiply(piece);
      if (sums.token >= 0) write(sums, piece, ys, staged, part);
    }
    for (int step = PIECES; step < steps; ++step) multiply(step);
    wait_for_products<0>();
    if (steps) release(before);
    keep(sums, c, low, high, row + part * 64, first);
  }
  if (sums.token >= 0) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) write(sums, piece, ys, staged, part);
  }
  if (threadIdx.x % 128 == 0) wait_until_read<0>();
}
