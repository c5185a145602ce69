// A program: steps on tensors, group of images by group of images. Everything but the batch was decided when it was
// written (kernels/network): where tensors lie in the arena, their layout, the offsets of non-zeros.
#pragma once
#include <alloca.h>

#include <chrono>

#include "depthwise.h"
#include "linear.h"
#include "lanes.h"
#include "lines.h"
#include "rows.h"

namespace sn {

static void conv2d(const Conv& c) {
  if (is_depthwise(c)) return conv_depthwise(c);
  on_lines(c) ? conv_lines(c) : conv_padded(c);
}

struct Group {
  const Program& p;
  const float* x;
  float* y;
  float* arena;
  int64_t first, images;
  int threads;

  const Tensor& tensor(int i) const { return at<Tensor>(&p, sizeof(Program))[i]; }
  View view(int i) const {
    const Tensor& t = tensor(i);
    float* base = t.kind == kFrom ? const_cast<float*>(x) + first * t.image
                  : t.kind == kTo ? y + first * t.image
                                  : arena + t.offset;
    const int64_t height = t.kind == kPixels ? t.height / p.parts : t.height;
    return {base, t.image, t.channel, t.pitch, height, t.width, t.border};
  }
  template <class T>
  const T* part(int64_t offset) const {
    return offset < 0 ? nullptr : at<T>(&p, offset);
  }

  bool lanes(int i) const { return tensor(i).kind == kPixels; }

  void run(const Step& s) const {
    if (lanes(s.in) || lanes(s.out)) return run_lanes(s);
    switch (s.operation) {
      case kLinear: return linear(&s);
      case kConv2d: return convolution(s);
      case kPool: return pool({view(s.in), view(s.out).from_channel(s.at), height(s), width(s), s.kind}, images,
                              tensor(s.in).channels, threads);
      case kMean: return mean(view(s.in), images, tensor(s.in).channels, view(s.out).base, threads);
      case kMap: return map({view(s.in), view(s.other < 0 ? s.in : s.other), view(s.out).from_channel(s.at),
                             s.other >= 0, s.stride_h, s.activation}, images, tensor(s.in).channels, threads);
      case kZero: return zero(view(s.out), images, tensor(s.out).channels);
    }
  }

  void run_lanes(const Step& s) const {
    const int64_t channels = tensor(s.in).channels, parts = p.parts;
    const View in = view(s.in), out = view(s.out).from_channel(s.at);
    switch (s.operation) {
      case kConv2d: return convolution(s);
      case kPool: return pool_lanes({in, out, height(s), width(s), s.kind}, channels, parts, threads);
      case kMean: return mean_lanes(in, images, channels, parts, out.base, threads);
      case kZero: return zero_lanes(out, tensor(s.out).channels);
      case kLinear: return;  // reads and writes dense tensors; kernels/network/program.py lets no other pass
    }
    if (!lanes(s.in)) return enter(in, out, images, channels, parts, threads);
    if (!lanes(s.out)) return leave(in, out, images, channels, parts, threads);
    map_lanes({in, s.other < 0 ? in : view(s.other), out, s.other >= 0, s.stride_h, s.activation}, channels, parts,
              threads);
  }

  Axis height(const Step& s) const {
    return {tensor(s.in).height, tensor(s.out).height, s.stride_h, s.padding_h, s.dilation_h, s.kernel_h};
  }
  Axis width(const Step& s) const {
    return {tensor(s.in).width, tensor(s.out).width, s.stride_w, s.padding_w, s.dilation_w, s.kernel_w};
  }

  void convolution(const Step& s) const {
    const Header* h = part<Header>(s.weight);
    Conv c{h, view(s.in), view(s.out).from_channel(s.at), images, height(s), width(s),
           rows_of(*h, part<float>(s.bias), s.activation), 1};
    if (s.other >= 0) c.other = view(s.other);
    c.offsets = part<int32_t>(s.offsets);
    c.inside = part<int32_t>(s.inside);
    c.threads = useful_threads(threads, c.multiply_adds());
    lanes(s.in) ? conv_lanes(c, p.parts) : conv2d(c);
  }

  // a run of linear layers; only the last one's output is kept
  void linear(const Step* s) const {
    const int count = s->run;
    Layer* layers = static_cast<Layer*>(alloca(sizeof(Layer) * static_cast<size_t>(count)));
    for (int i = 0; i < count; ++i)
      layers[i] = {part<Header>(s[i].weight), part<float>(s[i].bias), s[i].activation};
    linear_chain(layers, count, view(s->in).base, images, view(s[count - 1].out).base, threads);
  }
};

static int64_t nanoseconds() {
  using namespace std::chrono;
  return duration_cast<std::chrono::nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// times: nanoseconds of each step are added, or null
static void run_program(const Program& p, const float* x, int64_t images, float* y, int threads, int64_t* times) {
  float* arena = p.arena ? scratch.get<float>(kArena, p.arena) : nullptr;
  const Step* steps = at<Step>(&p, static_cast<int64_t>(sizeof(Program) + sizeof(Tensor) * static_cast<size_t>(p.tensors)));
  for (int64_t first = 0; first < images; first += p.images) {
    const Group group{p, x, y, arena, first, std::min<int64_t>(p.images, images - first), threads};
    for (int i = 0; i < p.steps; i += std::max(1, steps[i].run)) {
      const int64_t begun = times ? nanoseconds() : 0;
      group.run(steps[i]);
      if (times) times[i] += nanoseconds() - begun;
    }
  }
}

}  // namespace sn
