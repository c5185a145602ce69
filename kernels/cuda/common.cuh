// What the CUDA C++ kernels share: narrow floats as bits, loads, activations, and the order of kernels.
typedef unsigned int u32;
typedef unsigned short u16;

#define DEVICE static __device__ __forceinline__

#if BF16
#define KIND "bf16"
#else
#define KIND "f16"
#endif

DEVICE uint4 load_weight(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
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
