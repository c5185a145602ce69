// The gradient of a weight of which blocks are kept, held whole, on compute capability 9.0:
// y[r, c] = sum_t g[t, r] x[t, c] where the block of (r, c) is kept, else 0. A product of dense with its zeros.
//
// A thread block takes one tile of HEIGHT rows and SPAN columns of every so many. Its ninth warp asks the copy engine for 64
// tokens of g and of x at a time, STAGES steps ahead, also of the next tile while one is written; three more look up which
// blocks of the tiles to come are kept. Two groups of four warps multiply (wgmma), 64 rows (its M) by all columns (its N)
// each, and give sums to the copy engine 64 columns at a time, beside the first products of the next tile. Of 64 rows, for
// weights of few tiles, the groups take steps in turn, and the first adds the other's sums to its own.
//
// Operands lie as they are stored, a token's numbers one after another, 64 to a line; wgmma transposes both.
//
// Given: HEIGHT (128 or 64), SPAN (256, 192, 128 or 64), STAGES, BH and BW (rows and columns of a block, multiples of 16), BF16.

#define W_LINE 128
#define K_BYTES 0
#define PIECE 64
#include "hopper.cuh"

constexpr int BOX = STEP * LINE;                     // bytes of 64 tokens of 64 columns
constexpr int RING = 4, SPARE = 3, UNIT = 16;        // tiles that are looked up ahead, by so many warps; least side of a block
// of a tile a group meets every second stage, each in all of its phases; between tiles groups wait for each other
static_assert(!TURNS || STAGES % 2 == 0, "else a group would miss phases of a stage");
static_assert(!TURNS || SPAN / 2 * 512 <= 2 * Y_BYTES, "a group's sums come behind those that are written");
constexpr u32 ONES = (1u << BW / UNIT) - 1;          // a bit for 16 columns
constexpr int KEPT = EMPTY + 8 * STAGES, KEPT_FULL = KEPT + 4 * WARPS * RING, KEPT_EMPTY = KEPT_FULL + 8 * RING;
constexpr int NEAR = 16;                             // rows of tiles, all columns of which come before others

// where an operand of wgmma begins whose numbers of a token lie side by side, in boxes of 64
DEVICE u64 turned(u32 at) { return (u64)(at >> 4) | (u64)(BOX / 16) << 16 | (u64)(8 * LINE / 16) << 32 | 1ull << 62; }
constexpr int AHEAD = UNIT * LINE / 16;  // from one product's tokens to the next one's

// 16 tokens of 64 rows by those of all columns
#if SPAN == 256
#define HELD C64(0), C64(64)
#define PRODUCT "setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." KIND "." KIND " {" SUMS128 "}, %128, %129"
#elif SPAN == 192
#define HELD C64(0), C16(64), C16(80)
#define PRODUCT "setp.ne.b32 p, %98, 0; wgmma.mma_async.sync.aligned.m64n192k16.f32." KIND "." KIND " {" SUMS96 "}, %96, %97"
#elif SPAN == 128
#define HELD C64(0)
#define PRODUCT "setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND "." KIND " {" SUMS64 "}, %64, %65"
#else
#define HELD C16(0), C16(16)
#define PRODUCT "setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." KIND "." KIND " {" SUMS32 "}, %32, %33"
#endif
DEVICE void multiply_turned(float (&c)[SPAN / 2], u64 g, u64 x, int add) {
  asm volatile("{ .reg .pred p; " PRODUCT ", p, 1, 1, 1, 1; }" : HELD : "l"(g), "l"(x), "r"(add));
}

// of the groups that take steps in turn the second gives its sums to the first
DEVICE void add_other(float (&c)[SPAN / 2], u32 shared, int part) {
  const u32 mine = shared + threadIdx.x % 128 * 4;
  asm volatile("" : HELD::"memory");  // they are read from here on only
  if (part)
#pragma unroll
    for (int i = 0; i < SPAN / 2; ++i) asm volatile("st.shared.f32 [%0], %1;" ::"r"(mine + i * 512), "f"(c[i]) : "memory");
  asm volatile("bar.sync 3, 256;" ::: "memory");
  if (!part)
#pragma unroll
    for (int i = 0; i < SPAN / 2; ++i) {
      float other;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(other) : "r"(mine + i * 512) : "memory");
      c[i] += other;
    }
  asm volatile("bar.sync 3, 256;" ::: "memory");
}

struct Tile { int row, column; };
DEVICE Tile placed(int tile, int down, int across) {
  const int first = tile / (NEAR * across) * NEAR, side = min(down - first, NEAR), rest = tile % (NEAR * across);
  return {(first + rest % side) * ROWS, rest / side * SPAN};
}

// of a row's columns every so many is looked at, by 32 lanes
DEVICE int apart(int begins, int ends) { return (ends - begins + 31) / 32; }

struct Sums {
  u32 pairs[SPAN / 4];
  int row = -1, column;  // -1: there are none
};
// sums of the blocks that a warp's rows keep: a bit for 16 columns
DEVICE void keep(Sums& sums, float (&c)[SPAN / 2], u32 kept, int row, int column) {
  asm volatile("" : HELD::"memory");  // they are read from here on only
#pragma unroll
  for (int i = 0; i < SPAN / 4; ++i) sums.pairs[i] = kept >> i / 4 & 1 ? both(c[2 * i], c[2 * i + 1]) : 0;
  sums.row = row, sums.column = column;
}
// 64 columns by the four warps of `part`, by way of shared memory from `staged` on
DEVICE void write(const Sums& sums, int piece, const Map& ys, u32 staged, int part) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
  const u32 base = staged + piece % 2 * Y_BYTES;
  const bool leads = threadIdx.x % 128 == 0;
  if (leads) wait_until_read<(PIECES % 2 == 0)>();  // the piece in whose place this one comes
  asm volatile("bar.sync %0, 128;" ::"r"(1 + part) : "memory");
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const u32* p = sums.pairs + piece * 16 + 2 * j;
    const u32 to = base + row * LINE + ((j + lane / 16) ^ row % 8) * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(1 + part) : "memory");
  if (leads) store(ys, sums.column + piece * PIECE, sums.row, base);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
whole_grad(const __grid_constant__ Map gs, const __grid_constant__ Map xs, const __grid_constant__ Map ys, const int* starts,
           const int* columns, int rows, int channels, int steps) {
  extern __shared__ uint4 memory[];
  const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int down = (rows + ROWS - 1) / ROWS, across = (channels + SPAN - 1) / SPAN, all = down * across;
  if (threadIdx.x == 0)
    for (int r = 0; r < RING; ++r) init(base + KEPT_FULL + 8 * r, SPARE), init(base + KEPT_EMPTY + 8 * r, WARPS);
  begin(base);
  int stage = 0, slot = 0;
  u32 phase = 0, turn = 0;
  const auto advance = [&]() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  };
  const auto advance_slot = [&]() {
    if (++slot == RING) slot = 0, turn ^= 1;
  };
  if (warp >= WARPS) {
    take_few_registers();
    wait_for_input();
    if (warp == WARPS) {
      if (lane > 0) return;
      for (int tile = blockIdx.x; tile < all; tile += gridDim.x) {
        const Tile at = placed(tile, down, across);
        for (int step = 0; step < steps; ++step, advance()) {
          const u32 full = base + FULL + 8 * stage, to = base + stage * STAGE;
          wait(base + EMPTY + 8 * stage, phase ^ 1);
          expect(full, STAGE);
#pragma unroll
          for (int i = 0; i < ROWS / 64; ++i) load(to + X_BYTES + i * BOX, gs, at.row + 64 * i, step * STEP, full);
#pragma unroll
          for (int i = 0; i < SPAN / 64; ++i) load(to + i * BOX, xs, at.column + 64 * i, step * STEP, full);
        }
      }
      return;
    }
    for (int tile = blockIdx.x; tile < all; tile += gridDim.x, advance_slot()) {
      const Tile at = placed(tile, down, across);
      const int first = at.column / BW, end = (at.column + SPAN - 1) / BW + 1;  // blocks
      int from[SPARE], ends[SPARE];  // of the columns of a row of blocks
      u32 kept[SPARE];
      // columns ascend: a look at 32 of them says from which on
#pragma unroll
      for (int k = 0; k < SPARE; ++k) {
        const int part = warp - WARPS - 1 + k * SPARE, row = at.row + part * UNIT;
        const bool there = part < ROWS / UNIT && row < rows;
        from[k] = there ? starts[row / BH] : 0, ends[k] = there ? starts[row / BH + 1] : 0;
      }
#pragma unroll
      for (int k = 0; k < SPARE; ++k)
        kept[k] = from[k] < ends[k] ? columns[min(from[k] + lane * apart(from[k], ends[k]), ends[k] - 1)] : first;
#pragma unroll
      for (int k = 0; k < SPARE; ++k) {
        const int before = __popc(__ballot_sync(0xffffffffu, (int)kept[k] < first));
        from[k] += max(before - 1, 0) * apart(from[k], ends[k]), kept[k] = 0;
      }
      for (bool more = true; more;) {
        int column[SPARE];
        more = false;
#pragma unroll
        for (int k = 0; k < SPARE; ++k) column[k] = from[k] + lane < ends[k] ? columns[from[k] + lane] : end;
#pragma unroll
        for (int k = 0; k < SPARE; ++k) {
          const int side = column[k] * (BW / UNIT) - at.column / UNIT;  // it may begin before the tile
          if (column[k] >= first && column[k] < end) kept[k] |= side < 0 ? ONES >> -side : ONES << side;
          more |= __all_sync(0xffffffffu, column[k] < end), from[k] += 32;
        }
      }
      wait(base + KEPT_EMPTY + 8 * slot, turn ^ 1);
#pragma unroll
      for (int k = 0; k < SPARE; ++k) {
        const int part = warp - WARPS - 1 + k * SPARE;
        const u32 word = __reduce_or_sync(0xffffffffu, kept[k]);
        if (lane == 0 && part < ROWS / UNIT)
          asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + KEPT + 4 * (slot * WARPS + part)), "r"(word) : "memory");
      }
      release(base + KEPT_FULL + 8 * slot);
    }
    return;
  }
  take_many_registers();
  wait_for_input();
  const int part = warp / 4, own = TURNS ? part : 0;  // own: the first step
  const int row = TURNS ? 0 : part * 64;
  const u32 staged = base + STAGES * STAGE + (TURNS ? 0 : part * 2 * Y_BYTES);
  Sums sums;
  for (int tile = blockIdx.x; tile < all; tile += gridDim.x, advance_slot()) {
    const Tile at = placed(tile, down, across);
    float c[SPAN / 2];
    u32 before = 0;
    const auto multiply = [&](int step) {
      if (TURNS && step % 2 != part) return advance();
      wait(base + FULL + 8 * stage, phase);
      const u32 from = base + stage * STAGE;
      const u64 x = turned(from), g = turned(from + X_BYTES + row * LINE);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_turned(c, g + AHEAD * k, x + AHEAD * k, step - own + k);
      end_products();
      wait_for_products<1>();
      if (step > own) release(before);
      before = base + EMPTY + 8 * stage;
      advance();
    };
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      if (piece < steps) multiply(piece);
      if (sums.row >= 0) write(sums, piece, ys, staged, part);
    }
    for (int step = PIECES; step < steps; ++step) multiply(step);
    wait(base + KEPT_FULL + 8 * slot, turn);
    u32 kept;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(kept) : "r"(base + KEPT + 4 * (slot * WARPS + row / UNIT + warp % 4)) : "memory");
    __syncwarp();
    release(base + KEPT_EMPTY + 8 * slot);
    wait_for_products<0>();
    if (own < steps) release(before);
    if (TURNS && steps > 1) add_other(c, base + STAGES * STAGE + 2 * Y_BYTES, part);
    if (!TURNS || !part) keep(sums, c, kept, at.row + row, at.column);
  }
  if (sums.row >= 0) {
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) write(sums, piece, ys, staged, part);
  }
  if (threadIdx.x % 128 == 0) wait_until_read<0>();
}
