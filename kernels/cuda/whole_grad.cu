// The gradient of a weight of which blocks are kept, held whole, on compute capability 9.0:
// y[r, c] = sum_t g[t, r] x[t, c] where the block of (r, c) is kept, else 0. A product of dense with its zeros. Where INPUT is
// not 0, also the gradient of x: z[t, c] = sum_r g[t, r] w[r, c].
//
// A thread block takes one tile of HEIGHT rows and WEIGHT columns of every so many. Its ninth warp asks the copy engine for 64
// tokens of g and of x at a time, STAGES steps ahead, also of the next tile while one is written; three more look up which
// blocks of the tiles to come are kept. Two groups of four warps multiply (wgmma), 64 rows (its M) by all columns (its N)
// each, and give sums to the copy engine 64 columns at a time, beside the first products of the next tile. Of 64 rows, for
// weights of few tiles, the groups take steps in turn, and the first adds the other's sums to its own.
//
// Tiles of z are of HEIGHT tokens and INPUT columns, its steps of 64 rows of w. Of the product whose tiles take longer a thread
// block takes its tiles first.
//
// Operands lie as they are stored, 64 numbers of a token or of a row of w to a line; wgmma transposes both (of z the second).
//
// Given: HEIGHT (128 or 64), WEIGHT (256, 192, 128 or 64), INPUT (one of these or 0), STAGES, BF16.

#define W_LINE 128
#define K_BYTES 0
#define PIECE 64
#define SPAN (WEIGHT > INPUT ? WEIGHT : INPUT)
#include "hopper.cuh"

constexpr int BOX = STEP * LINE;                     // bytes of 64 lines of 64 columns
constexpr int RING = 4, SPARE = 3, UNIT = 16;        // tiles that are looked up ahead, by so many warps; least side of a block
// of a tile a group meets every second stage, each in all of its phases; between tiles groups wait for each other
static_assert(!TURNS || STAGES % 2 == 0, "else a group would miss phases of a stage");
static_assert(!TURNS || SPAN / 2 * 512 <= 2 * Y_BYTES, "a group's sums come behind those that are written");
static_assert(!TURNS || !INPUT, "two products are not made by steps in turn");
constexpr int KEPT = EMPTY + 8 * STAGES, KEPT_FULL = KEPT + 4 * WARPS * RING, KEPT_EMPTY = KEPT_FULL + 8 * RING;
constexpr int NEAR = 16;                             // rows of tiles, all columns of which come before others

// where an operand of wgmma begins that it transposes, in boxes of 64
DEVICE u64 turned(u32 at) { return (u64)(at >> 4) | (u64)(BOX / 16) << 16 | (u64)(8 * LINE / 16) << 32 | 1ull << 62; }
constexpr int AHEAD = UNIT * LINE / 16;  // from one product's lines to the next one's

// 16 of a step, of 64 rows by N columns; TURNED: whether the first operand is transposed
#define PRODUCTS(N, LIST, A, B, ADD, TURN, ...)                                                                                \
  template <int TURNED>                                                                                                        \
  DEVICE void multiply_turned(float (&c)[N / 2], u64 a, u64 b, int add) {                                                      \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KIND "." KIND      \
                 " {" LIST "}, " A ", " B ", p, 1, 1, " TURN ", 1; }"                                                            \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(add), "n"(TURNED));                                                        \
  }                                                                                                                            \
  DEVICE void settle(float (&c)[N / 2]) { asm volatile("" : __VA_ARGS__::"memory"); }  // they are read from here on only
PRODUCTS(256, SUMS128, "%128", "%129", "%130", "%131", C64(0), C64(64))
PRODUCTS(192, SUMS96, "%96", "%97", "%98", "%99", C64(0), C16(64), C16(80))
PRODUCTS(128, SUMS64, "%64", "%65", "%66", "%67", C64(0))
PRODUCTS(64, SUMS32, "%32", "%33", "%34", "%35", C16(0), C16(16))

// of the groups that take steps in turn the second gives its sums to the first
template <int COUNT>
DEVICE void add_other(float (&c)[COUNT], u32 shared, int part) {
  const u32 mine = shared + threadIdx.x % 128 * 4;
  settle(c);
  if (part)
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("st.shared.f32 [%0], %1;" ::"r"(mine + i * 512), "f"(c[i]) : "memory");
  asm volatile("bar.sync 3, 256;" ::: "memory");
  if (!part)
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float other;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(other) : "r"(mine + i * 512) : "memory");
      c[i] += other;
    }
  asm volatile("bar.sync 3, 256;" ::: "memory");
}

// what a thread block takes of a product: tiles of N columns, one of every so many, and steps of each
template <int N>
struct Tiles {
  int down, across, steps, first, every, end;
};
struct Tile { int row, column; };
template <int N>
DEVICE Tiles<N> tiles_of(int rows, int columns, int summed) {
  const int down = (rows + ROWS - 1) / ROWS, across = (columns + N - 1) / N;
  return {down, across, (summed + STEP - 1) / STEP, (int)blockIdx.x, (int)gridDim.x, down * across};
}
// of the product that comes second: thread blocks that took one tile of the first less than others take `each`, or what is
// left, and the others the rest
template <int N>
DEVICE void come_second(Tiles<N>& own, int others, int each) {
  const int block = blockIdx.x, most = others % (int)gridDim.x, fewer = (int)gridDim.x - most, theirs = min(own.end, fewer * each);
  if (block >= most) own.first = block - most, own.every = fewer, own.end = theirs;
  else own.first = theirs + block, own.every = most;
}
template <int N>
DEVICE Tile placed(const Tiles<N>& of, int tile) {
  const int first = tile / (NEAR * of.across) * NEAR, side = min(of.down - first, NEAR), rest = tile % (NEAR * of.across);
  return {(first + rest % side) * ROWS, rest / side * N};
}

// stages that are under way, or tiles that are looked up
template <int COUNT>
struct Ring {
  int at = 0;
  u32 phase = 0;
  __device__ __forceinline__ void advance() {
    if (++at == COUNT) at = 0, phase ^= 1;
  }
};

// OF_X: the gradient of x, whose first operand lies as wgmma takes it
template <bool OF_X, int N>
DEVICE void bring(const Tiles<N>& tiles, Ring<STAGES>& ring, u32 base, const Map& gs, const Map& others) {
  for (int tile = tiles.first; tile < tiles.end; tile += tiles.every) {
    const Tile at = placed(tiles, tile);
    for (int step = 0; step < tiles.steps; ++step, ring.advance()) {
      const u32 full = base + FULL + 8 * ring.at, to = base + ring.at * STAGE;
      wait(base + EMPTY + 8 * ring.at, ring.phase ^ 1);
      expect(full, W_BYTES + N * LINE);
#pragma unroll
      for (int i = 0; i < ROWS; i += 64) {
        if (OF_X) load(to + X_BYTES + i * LINE, gs, step * STEP, at.row + i, full);
        else load(to + X_BYTES + i * LINE, gs, at.row + i, step * STEP, full);
      }
#pragma unroll
      for (int i = 0; i < N; i += 64) load(to + i * LINE, others, at.column + i, step * STEP, full);
    }
  }
}

// of a row's columns every so many is looked at, by 32 lanes
DEVICE int apart(int begins, int ends) { return (ends - begins + 31) / 32; }

// which blocks of tiles are kept: a bit for 16 columns, a word for 16 rows; a block has 16 << high rows and 16 << wide columns
template <int N>
DEVICE void look_up(const Tiles<N>& tiles, u32 base, const int* starts, const int* columns, int rows, int high, int wide) {
  const u32 ones = (1u << (1 << wide)) - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Ring<RING> ring;
  for (int tile = tiles.first; tile < tiles.end; tile += tiles.every, ring.advance()) {
    const Tile at = placed(tiles, tile);
    const int left = at.column / UNIT, first = left >> wide, end = (left + N / UNIT - 1 >> wide) + 1;  // 16 columns, blocks
    int from[SPARE], ends[SPARE];  // of the columns of a row of blocks
    u32 kept[SPARE];
    // columns ascend: a look at 32 of them says from which on
#pragma unroll
    for (int k = 0; k < SPARE; ++k) {
      const int part = warp - WARPS - 1 + k * SPARE, row = at.row + part * UNIT;
      const bool there = part < ROWS / UNIT && row < rows;
      const int* bounds = starts + (row / UNIT >> high);
      from[k] = there ? bounds[0] : 0, ends[k] = there ? bounds[1] : 0;
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
        const int side = (column[k] << wide) - left;  // it may begin before the tile
        if (column[k] >= first && column[k] < end) kept[k] |= side < 0 ? ones >> -side : ones << side;
        more |= __all_sync(0xffffffffu, column[k] < end), from[k] += 32;
      }
    }
    wait(base + KEPT_EMPTY + 8 * ring.at, ring.phase ^ 1);
#pragma unroll
    for (int k = 0; k < SPARE; ++k) {
      const int part = warp - WARPS - 1 + k * SPARE;
      const u32 word = __reduce_or_sync(0xffffffffu, kept[k]);
      if (lane == 0 && part < ROWS / UNIT)
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + KEPT + 4 * (ring.at * WARPS + part)), "r"(word) : "memory");
    }
    release(base + KEPT_FULL + 8 * ring.at);
  }
}

// --- sums

template <int N>
struct Sums {
  u32 pairs[N / 4];
  int row = -1, column;  // -1: there are none
};
// sums of the blocks that a warp's rows keep: a bit for 16 columns
template <int N>
DEVICE void keep(Sums<N>& sums, float (&c)[N / 2], u32 kept, int row, int column) {
  settle(c);
#pragma unroll
  for (int i = 0; i < N / 4; ++i) sums.pairs[i] = kept >> i / 4 & 1 ? both(c[2 * i], c[2 * i + 1]) : 0;
  sums.row = row, sums.column = column;
}
// 64 columns by the four warps of `part`, by way of shared memory from `staged` on
template <int N>
DEVICE void write(const Sums<N>& sums, int piece, const Map& ys, u32 staged, int part) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
  const u32 base = staged + piece % 2 * Y_BYTES;
  const bool leads = threadIdx.x % 128 == 0;
  if (leads) wait_until_read<(N / PIECE % 2 == 0)>();  // the piece in whose place this one comes
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

template <bool OF_X, int N>
DEVICE void multiply_tiles(const Tiles<N>& tiles, Ring<STAGES>& ring, u32 base, const Map& to) {
  constexpr int COUNT = N / PIECE;
  const int warp = threadIdx.x / 32, part = warp / 4, own = TURNS ? part : 0;  // own: the first step
  const int row = TURNS ? 0 : part * 64, steps = tiles.steps;
  const u32 staged = base + STAGES * STAGE + (TURNS ? 0 : part * 2 * Y_BYTES);
  Ring<RING> looked;
  Sums<N> sums;
  for (int tile = tiles.first; tile < tiles.end; tile += tiles.every) {
    const Tile at = placed(tiles, tile);
    float c[N / 2];
    u32 before = 0;
    const auto multiply = [&](int step) {
      if (TURNS && step % 2 != part) return ring.advance();
      wait(base + FULL + 8 * ring.at, ring.phase);
      const u32 from = base + ring.at * STAGE, rows = from + X_BYTES + row * LINE;
      const u64 other = turned(from), g = OF_X ? operand<LINE>(rows) : turned(rows);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_turned<!OF_X>(c, g + (OF_X ? 2 : AHEAD) * k, other + AHEAD * k, step - own + k);
      end_products();
      wait_for_products<1>();
      if (step > own) release(before);
      before = base + EMPTY + 8 * ring.at;
      ring.advance();
    };
#pragma unroll
    for (int piece = 0; piece < COUNT; ++piece) {
      if (piece < steps) multiply(piece);
      if (sums.row >= 0) write(sums, piece, to, staged, part);
    }
    for (int step = COUNT; step < steps; ++step) multiply(step);
    u32 kept = ~0u;
    if (!OF_X) {
      wait(base + KEPT_FULL + 8 * looked.at, looked.phase);
      const u32 word = base + KEPT + 4 * (looked.at * WARPS + row / UNIT + warp % 4);
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(kept) : "r"(word) : "memory");
      __syncwarp();
      release(base + KEPT_EMPTY + 8 * looked.at);
      looked.advance();
    }
    wait_for_products<0>();
    if (own < steps) release(before);
    if (TURNS && steps > 1) add_other(c, base + STAGES * STAGE + 2 * Y_BYTES, part);
    if (!TURNS || !part) keep(sums, c, kept, at.row + row, at.column);
  }
  if (sums.row >= 0) {
#pragma unroll
    for (int piece = 0; piece < COUNT; ++piece) write(sums, piece, to, staged, part);
  }
  if (threadIdx.x % 128 == 0) wait_until_read<0>();
}

#if INPUT
#define MAPS const __grid_constant__ Map ws, const __grid_constant__ Map zs,
#else
#define MAPS
#endif

// each: of tiles of the product that comes second, see come_second; below 0: that is the gradient of x
extern "C" __global__ void __launch_bounds__(THREADS, 1)
whole_grad(const __grid_constant__ Map gs, const __grid_constant__ Map xs, const __grid_constant__ Map ys, MAPS
           const int* starts, const int* columns, int rows, int channels, int tokens, int high, int wide, int each) {
  extern __shared__ uint4 memory[];
  const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0)
    for (int r = 0; r < RING; ++r) init(base + KEPT_FULL + 8 * r, SPARE), init(base + KEPT_EMPTY + 8 * r, WARPS);
  begin(base);
  Tiles<WEIGHT> of_weight = tiles_of<WEIGHT>(rows, channels, tokens);
  Ring<STAGES> ring;
#if INPUT
  Tiles<INPUT> of_x = tiles_of<INPUT>(tokens, channels, rows);
  const bool last = each < 0;
  if (last) come_second(of_x, of_weight.end, -each);
  else come_second(of_weight, of_x.end, each);
#endif
  if (warp >= WARPS) {
    take_few_registers();
    wait_for_input();
    if (warp > WARPS) return look_up(of_weight, base, starts, columns, rows, high, wide);
    if (threadIdx.x % 32 > 0) return;
#if INPUT
    if (!last) bring<true>(of_x, ring, base, gs, ws);
#endif
    bring<false>(of_weight, ring, base, gs, xs);
#if INPUT
    if (last) bring<true>(of_x, ring, base, gs, ws);
#endif
    return;
  }
  take_many_registers();
  wait_for_input();
#if INPUT
  if (!last) multiply_tiles<true>(of_x, ring, base, zs);
#endif
  multiply_tiles<false>(of_weight, ring, base, ys);
#if INPUT
  if (last) multiply_tiles<true>(of_x, ring, base, zs);
#endif
}
