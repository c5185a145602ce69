// What the CUDA C++ kernels share: narrow floats as bits, loads, activations, and the order of kernels.
typedef unsigned int u32;
typedef unsigned short u16;

#define DEVICE static __device__ __forceinline__

#if BF16
#define KIND "bf16"
#else
#define KIND "f16"
#endif

// not .nc: such a load may come behind the wait for the kernel before, where ptxas saw a reason
DEVICE uint4 load_weight(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE float widened(u32 bits) {
#if BF16
  return __uint_as_float(bits << 16);
#else
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"((u16)bits));
  return v;
#endif
}
DEVICE u16 rounded(float v) {
  u16 r;
  asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
DEVICE float activate(float v, int kind) {
  switch (kind) {
    case 1: return v < 0.f ? 0.f : v;
    case 2: return v < 0.f ? 0.f : v > 6.f ? 6.f : v;
    case 3: return v / (1.f + expf(-v));
    case 4: return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
    default: return v;
  }
}
// the kernel before this one has written all that it writes
DEVICE void wait_for_input() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// the kernel after this one may begin with what does not depend on this one
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// --- products by mma, warps that share the columns
#ifdef MT

DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// sums of all warps, added in their order; part: shared memory for them
constexpr int ROWS = 16 * MT, PITCH = ROWS + 4;
DEVICE void add_warps(float (*part)[8 * NT][PITCH], const float (&sum)[MT][NT][4], const float* bias, u16* y, int row,
                      int first_token, int tokens, int rows, int activation) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) part[warp][n * 8 + quad * 2 + i % 2][m * 16 + group + 8 * (i / 2)] = sum[m][n][i];
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * 8 * NT; i += 32 * WARPS) {
    const int r = i % ROWS, t = i / ROWS;
    if (first_token + t >= tokens || row + r >= rows) continue;
    float total = bias ? bias[row + r] : 0.f;
#pragma unroll
    for (int k = 0; k < WARPS; ++k) total += part[k][t][r];
    y[(long long)(first_token + t) * rows + row + r] = rounded(activate(total, activation));
  }
}
#endif
