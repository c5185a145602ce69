// One axis of a convolution, split by its stride into phases on which every tap is a shift.
#pragma once
#include <algorithm>
#include <cstdint>

namespace sn {

// ceil(a / b) for b > 0, and 0 for a <= 0
static inline int64_t ceil_pos(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

struct Axis {
  int64_t in, out, stride, pad, dilation, taps;

  int64_t phase(int64_t tap) const { return tap * dilation % stride; }
  int64_t shift(int64_t tap) const { return tap * dilation / stride; }
  int64_t reach() const { return shift(taps - 1); }
  bool uses(int64_t phase_) const {
    for (int64_t t = 0; t < taps; ++t)
      if (phase(t) == phase_) return true;
    return false;
  }
  // rank of a phase among those in use
  int64_t rank(int64_t phase_) const {
    int64_t n = 0;
    for (int64_t p = 0; p < phase_; ++p) n += uses(p);
    return n;
  }
  int64_t phases() const { return rank(stride); }
  // element i of a phase is input element i * stride + phase - pad; real ones are [first, last)
  int64_t first(int64_t phase_) const { return ceil_pos(pad - phase_, stride); }
  int64_t last(int64_t phase_) const { return ceil_pos(in + pad - phase_, stride); }
  int64_t source(int64_t phase_, int64_t i) const { return i * stride + phase_ - pad; }
  // Zeros that end one line and may begin the next, so that lines lie closer: never so close that
  // outputs meet.
  int64_t shared() const {
    int64_t common = reach();
    for (int64_t p = 0; p < stride; ++p)
      if (uses(p)) common = std::min({common, first(p), std::max<int64_t>(0, out + reach() - last(p))});
    return common;
  }
};

}  // namespace sn
