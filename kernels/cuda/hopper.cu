// Sparse linear of many tokens on compute capability 9.0: y[t, r] = act(sum_c w[r, c] x[t, c] + bias[r]), w in blocks of
// 128 x BC.
//
// A thread block takes tiles of 256 tokens and 128 rows in turn. Its last warp asks the copy engine for 64 columns of w
// and of x at a time, STAGES steps ahead, also of the next tile while one is written. Two groups of four warps multiply
// (wgmma), 64 rows of w (its M) by all tokens (its N) each, and give sums to the copy engine 64 tokens at a time.
//
// Which tiles a thread block takes was planned ahead: a line of `plan` for each, of numbers that count all lines of the
// first tokens first, and -1 where they end. Sums have one order: bit-equal in every run.
//
// Given: BC, STAGES, BIAS (whether there is one), ACT (activation), BF16.

#include "common.cuh"

typedef unsigned long long u64;
struct alignas(64) Map { u64 words[16]; };  // CUtensorMap

constexpr int TOKENS = 256, ROWS = 128, STEP = 64, SIDES = BC / STEP, LINE = 128;  // bytes of a row of what is copied
constexpr int X_BYTES = TOKENS * LINE, STAGE = X_BYTES + ROWS * LINE, PIECE = 64, Y_BYTES = PIECE * LINE;
constexpr int FULL = STAGES * STAGE + 4 * Y_BYTES, EMPTY = FULL + 8 * STAGES;  // barriers, behind stages and sums
constexpr int WARPS = 8, AHEAD = 3;

DEVICE void init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
DEVICE void expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void wait(u32 barrier, u32 phase) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }"
               ::"r"(barrier), "r"(phase) : "memory");
}
DEVICE void load(u32 to, const Map& from, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
               "[%4];" ::"r"(to), "l"(&from), "r"(column), "r"(row), "r"(barrier) : "memory");
}
DEVICE void store(const Map& to, int column, int row, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               ::"l"(&to), "r"(column), "r"(row), "r"(from) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int LEFT>
DEVICE void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

// where an operand of wgmma begins; lines of 128 bytes as the copy engine swizzles them, eight of them 1024 bytes on
DEVICE u64 operand(u32 at) { return (u64)(at >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define C64(i) C16(i), C16(i + 16), C16(i + 32), C16(i + 48)
DEVICE void multiply_by_group(float (&c)[128], u64 w, u64 x, int add) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." KIND "." KIND " {%0, %1, %2, %3, %4, "
      "%5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, "
      "%29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, "
      "%75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "
      "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, 0, 0; }"
      : C64(0), C64(64)
      : "l"(w), "l"(x), "r"(add));
}
DEVICE u32 pair(float low, float high, float bias) {
  if (BIAS) low += bias, high += bias;
  u32 both;
  low = activate(low, ACT), high = activate(high, ACT);
  asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

struct Tile { int number, begin, end, column; };  // of a tile, its blocks, and a lane's of their columns

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), 1)
hopper(const __grid_constant__ Map xs, const __grid_constant__ Map ws, const __grid_constant__ Map ys, const int* plan,
       const int* starts, const int* columns, const float* bias, int lines, int waves) {
  extern __shared__ uint4 memory[];
  const u32 base = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  plan += blockIdx.x * waves;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) init(base + FULL + 8 * s, 1), init(base + EMPTY + 8 * s, WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  let_next_begin();
  wait_for_input();
  // what lists say of a tile is asked for some tiles ahead, each thing once that is here which it depends on
  Tile next[AHEAD + 1];
  const auto number = [&](Tile& tile, int wave) { tile.number = wave < waves ? plan[wave] : -1; };
  const auto bounds = [&](Tile& tile) {
    const int* at = starts + tile.number % lines;
    tile.begin = tile.number < 0 ? 0 : at[0], tile.end = tile.number < 0 ? 0 : at[1];
  };
  const auto list = [&](Tile& tile) {
    tile.column = warp == WARPS && tile.begin + lane < tile.end ? columns[tile.begin + lane] : 0;
  };
#pragma unroll
  for (int i = 0; i <= AHEAD; ++i) {
    number(next[i], i);
    if (i < AHEAD) bounds(next[i]);
    if (i < AHEAD - 1) list(next[i]);
  }
  const auto turn = [&](int wave) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) next[i] = next[i + 1];
    list(next[AHEAD - 2]), bounds(next[AHEAD - 1]), number(next[AHEAD], wave + AHEAD + 1);
  };
  int stage = 0;
  u32 phase = 0;
  const auto advance = [&]() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  };
  if (warp == WARPS) {
    for (int wave = 0; next[0].number >= 0; turn(wave), ++wave) {
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
            load(to + X_BYTES, ws, side * STEP, i * ROWS, full);
            load(to, xs, from + side * STEP, token, full);
          }
        __syncwarp();
      }
    }
    return;
  }
  const int part = warp / 4, quarter = warp % 4, mine = part * 64 + quarter * 16 + lane / 4;  // row, and that 8 on
  const bool leads = threadIdx.x % 128 == 0;
  const u32 staged = base + STAGES * STAGE + part * 2 * Y_BYTES;
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
    for (int step = 0; step < steps; ++step, advance()) {
      wait(base + FULL + 8 * stage, phase);
      const u64 x = operand(base + stage * STAGE), w = operand(base + stage * STAGE + X_BYTES + part * 64 * LINE);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < 4; ++k) multiply_by_group(c, w + 2 * k, x + 2 * k, step + k);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (step && lane == 0) arrive(before);
      before = base + EMPTY + 8 * stage;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    asm volatile("" : C64(0), C64(64)::"memory");  // sums are read from here on only
    if (steps && lane == 0) arrive(before);
    const int token = lane / 16 * 8 + lane % 8, chunk = (quarter * 2 + lane / 8 % 2) ^ token % 8;
    const u32 to = staged + token * LINE + chunk * 16;
#pragma unroll
    for (int piece = 0; piece < TOKENS / PIECE; ++piece) {
      if (leads) wait_until_read<1>();  // the piece before the last, in whose place this one comes
      asm volatile("bar.sync %0, 128;" ::"r"(1 + part) : "memory");
#pragma unroll
      for (int j = 0; j < PIECE; j += 16) {
        const float* s = c + (piece * PIECE + j) / 2;
        const u32 a = pair(s[0], s[1], low), b = pair(s[2], s[3], high), d = pair(s[4], s[5], low), e = pair(s[6], s[7], high);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(to + piece % 2 * Y_BYTES + j * LINE), "r"(a), "r"(b), "r"(d), "r"(e) : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      asm volatile("bar.sync %0, 128;" ::"r"(1 + part) : "memory");
      if (leads) store(ys, row + part * 64, first + piece * PIECE, staged + piece % 2 * Y_BYTES);
    }
  }
  if (leads) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
