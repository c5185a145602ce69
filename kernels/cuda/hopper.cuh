// What hopper.cu, halves.cu and whole_grad.cu share: the copy engine, barriers, wgmma, and how the first two write sums.
//
// Given: W_LINE (bytes of 64 columns of a row of w as they are stored), K_BYTES (of words for 64 columns of all rows), SPAN
// and HEIGHT (tokens of a tile, of whole_grad.cu columns, and rows; else 256 and 128), PIECE (tokens that are written at
// once), STAGES, BF16; of the first two BIAS (whether there is one) and ACT.

#include "common.cuh"

typedef unsigned long long u64;
struct alignas(64) Map { u64 words[16]; };  // CUtensorMap

#ifndef SPAN
#define SPAN 256
#endif
#ifndef HEIGHT
#define HEIGHT 128
#endif

constexpr int TOKENS = SPAN, ROWS = HEIGHT, STEP = 64, LINE = 128;  // of a tile; LINE: bytes of 64 columns of x
constexpr bool TURNS = ROWS == 64;  // whether the groups that multiply take steps in turn, not half of the rows each
constexpr int X_BYTES = TOKENS * LINE, W_BYTES = ROWS * W_LINE, STAGE = X_BYTES + W_BYTES + K_BYTES, Y_BYTES = PIECE * LINE;
constexpr int FULL = STAGES * STAGE + 4 * Y_BYTES, EMPTY = FULL + 8 * STAGES;  // barriers, behind stages and sums
constexpr int WARPS = 8, THREADS = 32 * (WARPS + 4), PIECES = TOKENS / PIECE;  // warps that multiply; four more load

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
// this warp has read a stage
DEVICE void release(u32 barrier) {
  if (threadIdx.x % 32 == 0) arrive(barrier);
}
// w and its lists may be read at once, they were complete before this was launched; what reads x or writes y waits
DEVICE void begin(u32 base) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) init(base + FULL + 8 * s, 1), init(base + EMPTY + 8 * s, TURNS ? WARPS / 2 : WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  let_next_begin();
}
DEVICE void store(const Map& to, int column, int row, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               ::"l"(&to), "r"(column), "r"(row), "r"(from) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// so many stores may still read what they write; it is written when the kernel has ended
template <int LEFT>
DEVICE void wait_until_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

// where an operand of wgmma begins; lines of so many bytes as the copy engine swizzles them, eight of them a unit
template <int BYTES>
DEVICE u64 operand(u32 at) {
  return (u64)(at >> 4) | 1ull << 16 | (u64)(BYTES / 2) << 32 | (BYTES == 128 ? 1ull : 2ull) << 62;
}
#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define C64(i) C16(i), C16(i + 16), C16(i + 32), C16(i + 48)
#define SUMS32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31"
#define SUMS64 \
  SUMS32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS96 \
  SUMS64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SUMS128 \
  SUMS96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// 16 columns of 64 rows of w by 256 tokens
DEVICE void multiply_by_group(float (&c)[128], u64 w, u64 x, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." KIND "." KIND
               " {" SUMS128 "}, %128, %129, p, 1, 1, 0, 0; }" : C64(0), C64(64) : "l"(w), "l"(x), "r"(add));
}
// 32 columns of which half are there; of a word `kinds` for two such products this one takes those of WHICH
template <int WHICH>
DEVICE void multiply_halves(float (&c)[128], u64 w, u64 x, u32 kinds, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %132, 0; wgmma.mma_async.sp.sync.aligned.m64n256k32.f32." KIND "." KIND
               " {" SUMS128 "}, %128, %129, %130, %131, p, 1, 1, 0, 0; }"
               : C64(0), C64(64) : "l"(w), "l"(x), "r"(kinds), "n"(WHICH), "r"(add));
}
// registers of a thread of the four warps that load, and of those that multiply: in all as many as there are
DEVICE void take_few_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
DEVICE void take_many_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
DEVICE u32 both(float low, float high) {
  u32 pair;
  asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// --- sums of rows of w and tokens, that become y[token, row]
#ifdef BIAS

DEVICE u32 pair(float low, float high, float bias) {
  if (BIAS) low += bias, high += bias;
  return both(activate(low, ACT), activate(high, ACT));
}

// The sums of a tile, which leave beside the first products of the next one: PIECE tokens at a time.
struct Written {
  u32 pairs[64];
  int row, token = -1;  // of y; -1: there are none
};
// c: of 64 rows and 256 tokens, of a lane those of two rows
DEVICE void keep(Written& sums, float (&c)[128], float low, float high, int row, int token) {
  asm volatile("" : C64(0), C64(64)::"memory");  // they are read from here on only
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    sums.pairs[i] = pair(c[2 * i], c[2 * i + 1], low);
    sums.pairs[i + 1] = pair(c[2 * i + 2], c[2 * i + 3], high);
  }
  sums.row = row, sums.token = token;
}
// by the four warps of `part`, by way of shared memory from `staged` on
DEVICE void write(const Written& sums, int piece, const Map& ys, u32 staged, int part) {
  const int lane = threadIdx.x % 32, quarter = threadIdx.x / 32 % 4;
  const int token = lane / 16 * 8 + lane % 8, chunk = (quarter * 2 + lane / 8 % 2) ^ token % 8;
  const u32 base = staged + piece % 2 * Y_BYTES, to = base + token * LINE + chunk * 16;
  const bool leads = threadIdx.x % 128 == 0;
  if (leads) wait_until_read<1>();  // the piece before the last, in whose place this one comes
  asm volatile("bar.sync %0, 128;" ::"r"(1 + part) : "memory");
#pragma unroll
  for (int j = 0; j < PIECE; j += 16) {
    const u32* p = sums.pairs + (piece * PIECE + j) / 4;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to + j * LINE), "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(1 + part) : "memory");
  if (leads) store(ys, sums.row, sums.token + piece * PIECE, base);
}

#endif
