// The C ABI. Each call returns a Status; kernels/native/library.py turns it into an error that names the values.
#include <alloca.h>

#include "conv2d.h"
#include "linear.h"

using namespace sn;

static const float* bias_of(const Program& p, const Link& link) {
  return link.bias < 0 ? nullptr : at<float>(&p, link.bias);
}

static Status run_linears(const Program& p, const float* x, int64_t batch, float* y, int threads) {
  if (batch == 0) return kOk;
  const Link* links = at<Link>(&p, sizeof(Program));
  Layer* layers = static_cast<Layer*>(alloca(sizeof(Layer) * static_cast<size_t>(p.links)));
  for (int i = 0; i < p.links; ++i)
    layers[i] = {at<Header>(&p, links[i].weight), bias_of(p, links[i]), links[i].activation};
  linear_chain(layers, p.links, x, batch, y, threads);
  return kOk;
}

static Axis axis(int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = in + 2 * pad - dilation * (taps - 1) - 1;
  return {in, room < 0 ? 0 : room / stride + 1, stride, pad, dilation, taps};
}

static Status run_convs(const Program& p, const float* x, const int64_t* shape, float* y, const int64_t* out_tail,
                        int threads) {
  const Link* links = at<Link>(&p, sizeof(Program));
  Conv* convs = static_cast<Conv*>(alloca(sizeof(Conv) * static_cast<size_t>(p.links)));
  int64_t height = shape[2], width = shape[3], largest = 0;
  for (int i = 0; i < p.links; ++i) {
    const Link& k = links[i];
    const Header* h = at<Header>(&p, k.weight);
    convs[i] = {h, x, y, shape[0], axis(height, h->kernel_h, k.stride_h, k.padding_h, k.dilation_h),
                axis(width, h->kernel_w, k.stride_w, k.padding_w, k.dilation_w),
                rows_of(*h, bias_of(p, k), k.activation), 1};
    convs[i].threads = useful_threads(threads, convs[i].multiply_adds());
    height = convs[i].rows.out, width = convs[i].cols.out;
    if (height < 1 || width < 1) return kMismatch;
    largest = std::max(largest, shape[0] * h->rows * height * width);
  }
  if (height != out_tail[1] || width != out_tail[2]) return kMismatch;
  if (shape[0] == 0) return kOk;
  float* out = p.links > 1 ? scratch.get<float>(kPing, largest) : nullptr;
  float* next = p.links > 2 ? scratch.get<float>(kPong, largest) : nullptr;
  for (int i = 0; i < p.links; ++i, std::swap(out, next)) {
    convs[i].x = x;
    if (i + 1 < p.links) convs[i].y = out;
    conv2d(convs[i]);
    x = convs[i].y;
  }
  return kOk;
}

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
  Conv c{h, x, y, g->images, {g->height, g->out_h, g->stride_h, g->pad_h, g->dilation_h, g->kernel_h},
         {g->width, g->out_w, g->stride_w, g->pad_w, g->dilation_w, g->kernel_w}, rows_of(*h, bias, activation), 1};
  c.threads = useful_threads(threads, c.multiply_adds());
  conv2d(c);
  return kOk;
}

// shape: images, channels, height, width of x; out_tail: channels, height, width of y, and tail 3. A linear
// program takes (samples, columns, 1, 1), (rows, 1, 1) and tail 1.
SN_EXPORT int sn_chain(const float* x, const int64_t* shape, const void* program, int64_t bytes, float* y,
                       const int64_t* out_tail, int tail, int threads) {
  if (const Status status = check_program(program, bytes)) return status;
  const Program& p = *static_cast<const Program*>(program);
  const Link* links = at<Link>(program, sizeof(Program));
  const Header *first = at<Header>(program, links[0].weight), *last = at<Header>(program, links[p.links - 1].weight);
  if (last->rows != out_tail[0] || static_cast<int64_t>(first->channels) * first->groups != shape[1]) return kMismatch;
  if ((tail == 3) != (first->operation == kConv2d)) return kMismatch;
  return tail == 3 ? run_convs(p, x, shape, y, out_tail, threads) : run_linears(p, x, shape[0], y, threads);
}

}  // extern "C"
