// A feature map as steps see it: where its pixels lie. What comes from outside is dense (NCHW); between steps of a
// program channels are lines: all images of a group one after another, rows parted by `border` zeros, and as many
// rows of zeros before and behind each image.
#pragma once
#include <cstring>

#include "simd.h"

namespace sn {

struct View {
  float* base;  // first pixel of the first channel of the first image
  int64_t image, channel, pitch;
  int64_t height, width, border;

  float* at(int64_t n, int64_t c) const { return base + n * image + c * channel; }
  bool whole() const { return pitch == width; }
  // floats from the first pixel to behind the last one of so many images
  int64_t line(int64_t images) const { return (images - 1) * image + (height - 1) * pitch + width; }
  View from_channel(int64_t c) const {
    View v = *this;
    v.base += c * channel;
    return v;
  }
};

static inline View dense_view(const float* base, int64_t channels, int64_t height, int64_t width) {
  return {const_cast<float*>(base), channels * height * width, height * width, width, height, width, 0};
}

static inline void clear(float* p, int64_t count) { std::memset(p, 0, static_cast<size_t>(count) * 4); }

// the zeros before the first image, and those behind image n
static inline void clear_before(const View& v, int64_t c) {
  const int64_t before = v.border * (v.pitch + 1);
  clear(v.at(0, c) - before, before);
}
static inline void clear_below(const View& v, int64_t n, int64_t c) {
  float* end = v.at(n, c) + (v.height - 1) * v.pitch + v.width;
  clear(end, v.border * (v.pitch + 1));
}
// all zeros around one channel of one image whose pixels are written
static inline void clear_around(const View& v, int64_t n, int64_t c) {
  if (v.border == 0) return;
  if (n == 0) clear_before(v, c);
  float* gap = v.at(n, c) + v.width;
  for (int64_t r = 0; r + 1 < v.height; ++r, gap += v.pitch)
    for (int64_t i = 0; i < v.border; ++i) gap[i] = 0.f;
  clear_below(v, n, c);
}

}  // namespace sn
