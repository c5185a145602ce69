// The C ABI. Each call returns a Status; kernels/native/library.py turns it into an error that names the values.
#include "limits.h"
#include "program.h"

using namespace sn;

#define SN_EXPORT __attribute__((visibility("default")))

extern "C" {

SN_EXPORT void sn_poison(int on) { poison = on != 0; }
SN_EXPORT void sn_threads(void* fork, void* number, void* size) {
  fork_team = reinterpret_cast<Fork>(fork);
  thread_number = reinterpret_cast<Count>(number);
  team_size = reinterpret_cast<Count>(size);
}

// the caller has checked every offset and column of this blob
SN_EXPORT void sn_checked(const void* blob, int64_t bytes) {
  checked.add(Checked::name(blob, bytes, *at<uint32_t>(blob, 24)));
}

SN_EXPORT int sn_linear(const float* x, int64_t batch, int64_t columns, const void* weight, int64_t bytes,
                        const float* bias, float* y, int64_t rows, int activation, int threads) {
  if (const Status status = check_weight(weight, bytes)) return status;
  const Header* h = static_cast<const Header*>(weight);
  if (h->operation != kLinear || h->channels != columns || h->rows != rows) return kMismatch;
  if (batch == 0 || rows == 0) return kOk;
  const Layer layer{h, bias, activation};
  linear_chain(&layer, 1, x, batch, y, threads);
  return kOk;
}

// what a convolution is called with, beside its tensors; kernels/calls.py writes it
struct Geometry {
  int64_t images, channels, height, width, rows, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h,
      dilation_w, groups, out_h, out_w;
};

SN_EXPORT int sn_conv2d(const float* x, const Geometry* g, const void* weight, int64_t bytes, const float* bias,
                        float* y, int activation, int threads) {
  if (const Status status = check_weight(weight, bytes)) return status;
  const Header* h = static_cast<const Header*>(weight);
  if (h->operation != kConv2d || h->rows != g->rows || h->groups != g->groups ||
      h->channels * g->groups != g->channels || h->kernel_h != g->kernel_h || h->kernel_w != g->kernel_w)
    return kMismatch;
  if (g->images == 0 || g->rows == 0) return kOk;
  Conv c{h, dense_view(x, g->channels, g->height, g->width), dense_view(y, g->rows, g->out_h, g->out_w), g->images, {g->height, g->out_h, g->stride_h, g->pad_h, g->dilation_h, g->kernel_h},
         {g->width, g->out_w, g->stride_w, g->pad_w, g->dilation_w, g->kernel_w}, rows_of(*h, bias, activation), 1};
  c.threads = useful_threads(threads, c.multiply_adds());
  conv2d(c);
  return kOk;
}

// shape: of x, out_tail: of y without the images; both channels, height, width (1, 1 for features).
// times: of each step, in nanoseconds, to be added to; or null
SN_EXPORT int sn_program(const float* x, const int64_t* shape, const void* program, int64_t bytes, float* y,
                         const int64_t* out_tail, int threads, int64_t* times) {
  if (const Status status = check_program(program, bytes)) return status;
  const Program& p = *static_cast<const Program*>(program);
  const Tensor* tensors = at<Tensor>(program, sizeof(Program));
  const auto fits = [](const Tensor& t, const int64_t* s) {
    return t.channels == s[0] && t.height == s[1] && t.width == s[2];
  };
  if (!fits(tensors[0], shape + 1) || !fits(tensors[1], out_tail)) return kMismatch;
  run_program(p, x, shape[0], y, threads, times);
  return kOk;
}

// both give a number that has no meaning, so that they are not left out
SN_EXPORT float sn_multiply_adds(int64_t count) { return multiply_adds(count); }
SN_EXPORT float sn_reads(const float* p, int64_t count, int64_t times) { return reads(p, count, times); }

}  // extern "C"
