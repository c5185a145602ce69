// The C ABI. Each call returns a Status; kernels/native/library.py turns it into an error that names the values.
#include <alloca.h>

#include "conv2d.h"
#include "linear.h"

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
SN_EXPORT void sn_checked(const void* blob, int64_t bytes) { checked.add(Checked::name(blob, bytes, *at<uint32_t>(blob, 24))); }

SN_EXPORT int sn_linear(const float* x, int64_t batch, int64_t columns, const void* weight, int64_t bytes, const float* bias,
              float* y, int64_t rows, int activation, int threads) {
  if (const Status status = check_weight(weight, bytes)) return status;
  const Header* h = static_cast<const Header*>(weight);
  if (h->operation != kLinear || h->channels != columns || h->rows != rows) return kMismatch;
  const Layer layer{h, bias, activation};
  linear_chain(&layer, 1, x, batch, y, threads);
  return kOk;
}

SN_EXPORT int sn_conv2d(const float* x, int64_t images, int64_t channels, int64_t height, int64_t width, const void* weight,
              int64_t bytes, const float* bias, float* y, int64_t rows, int64_t kernel_h, int64_t kernel_w,
              int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w, int64_t dilation_h, int64_t dilation_w,
              int64_t groups, int64_t out_h, int64_t out_w, int activation, int threads) {
  if (const Status status = check_weight(weight, bytes)) return status;
  const Header* h = static_cast<const Header*>(weight);
  if (h->operation != kConv2d || h->rows != rows || h->groups != groups || h->channels * groups != channels ||
      h->kernel_h != kernel_h || h->kernel_w != kernel_w)
    return kMismatch;
  Conv c{h, x, y, images, {height, out_h, stride_h, pad_h, dilation_h, kernel_h},
         {width, out_w, stride_w, pad_w, dilation_w, kernel_w}, rows_of(*h, bias, activation), threads};
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
  const auto weight = [&](int i) { return at<Header>(program, links[i].weight); };
  const auto bias = [&](int i) { return links[i].bias < 0 ? nullptr : at<float>(program, links[i].bias); };
  const Header* last = weight(p.links - 1);
  if ((tail == 3) != (links[0].operation == kConv2d) || last->rows != out_tail[0] || weight(0)->channels * static_cast<int64_t>(weight(0)->groups) != shape[1])
    return kMismatch;
  if (links[0].operation == kLinear) {
    Layer* layers = static_cast<Layer*>(alloca(sizeof(Layer) * static_cast<size_t>(p.links)));
    for (int i = 0; i < p.links; ++i) layers[i] = {weight(i), bias(i), links[i].activation};
    linear_chain(layers, p.links, x, shape[0], y, threads);
    return kOk;
  }
  Conv* convs = static_cast<Conv*>(alloca(sizeof(Conv) * static_cast<size_t>(p.links)));
  int64_t height = shape[2], width = shape[3], largest = 0;
  for (int i = 0; i < p.links; ++i) {
    const Link& k = links[i];
    const auto axis = [](int64_t in, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
      const int64_t room = in + 2 * pad - dilation * (taps - 1) - 1;
      return Axis{in, room < 0 ? 0 : room / stride + 1, stride, pad, dilation, taps};
    };
    Axis rows = axis(height, weight(i)->kernel_h, k.stride_h, k.padding_h, k.dilation_h);
    Axis cols = axis(width, weight(i)->kernel_w, k.stride_w, k.padding_w, k.dilation_w);
    convs[i] = {weight(i), nullptr, nullptr, shape[0], rows, cols, rows_of(*weight(i), bias(i), k.activation), 1};
    convs[i].threads = useful_threads(threads, convs[i].multiply_adds());
    height = rows.out, width = cols.out;
    if (height < 1 || width < 1) return kMismatch;
    if (i + 1 < p.links) largest = std::max(largest, shape[0] * weight(i)->rows * height * width);
  }
  if (height != out_tail[1] || width != out_tail[2]) return kMismatch;
  float* out = scratch.get<float>(kPing, largest);
  float* next = scratch.get<float>(kPong, largest);
  for (int i = 0; i < p.links; ++i, std::swap(out, next)) {
    convs[i].x = x;
    convs[i].y = i + 1 == p.links ? y : out;
    conv2d(convs[i]);
    x = convs[i].y;
  }
  return kOk;
}

}  // extern "C"
