// Sparse convolution in place: outputs lie as their inputs do, so that every tap is an offset along a line of pixels,
// and a vector of sums is stored where its pixels are. Between dense tensors a line is one image, inside a program it
// is a whole group of images; what lies between pixels there is stored as zero.
#pragma once
#include "conv2d.h"

namespace sn {

struct Masked {
  float* y;
  int64_t channel;
  const int32_t* inside;
  static constexpr bool kAtOnce = true;
  void one(int64_t row, int v, vf sum) const {
    vi bits, mask;
    std::memcpy(&bits, &sum, sizeof bits);
    std::memcpy(&mask, inside + v * V, sizeof mask);
    bits &= mask;
    std::memcpy(y + row * channel + v * V, &bits, sizeof bits);
  }
};

// images one after another in both, at the same places
static inline bool joined(const Conv& c) {
  return c.in.image == c.out.image && c.in.pitch == c.out.pitch && c.in.channel > c.in.image;
}

static inline bool on_lines(const Conv& c) {
  const bool same = c.rows.stride == 1 && c.cols.stride == 1 && c.rows.in == c.rows.out && c.cols.in == c.cols.out;
  if (!same) return false;
  if (joined(c) && c.out.channel > c.out.image && (c.offsets || c.rows.taps * c.cols.taps == 1)) return true;
  return c.rows.taps == 1 && c.cols.taps == 1 && c.in.whole() && c.out.whole() && c.rows.in * c.cols.in >= V;
}

// channels a multiple of 1 KiB apart fall into the same few sets of the first-level cache
static inline bool channels_clash(const Conv& c) { return c.in.channel % 256 == 0 && c.h->channels > 8; }

static const float* gather(const float* x, int64_t plane, int64_t channels, int64_t width, float* to) {
  for (int64_t ch = 0; ch < channels; ++ch)
    for (int64_t i = 0; i < width; i += V) store(to + ch * width + i, load(x + ch * plane + i));
  return to;
}

struct Line {
  int64_t image, group, begin, end;  // vectors
};

// vectors [begin, end) of a line, all rows of a group
static void line_panel(const Conv& c, const Line& l, int64_t start, float* partial, float* near) {
  const int64_t channels = c.h->channels, width = (l.end - l.begin) * V;
  const int units = static_cast<int>(c.group_rows() / c.h->block), from = static_cast<int>(l.group) * units;
  const float* x = c.in.at(l.image, l.group * channels) + start;
  float* y = c.out.at(l.image, 0) + start;
  Rows w = c.w;
  if (c.offsets) w.offsets = c.offsets, w.stride = 1;
  else w.stride = near ? width : c.in.channel;
  if (near) x = gather(x, c.in.channel, channels, width, near);
  if (c.other.base) w.other = c.other.at(l.image, 0) + start, w.other_stride = c.other.channel;
  if (c.inside)
    any_panel(w, l.end - l.begin, from, from + units, x, partial, Masked{y, c.out.channel, c.inside + start});
  else
    any_panel(w, l.end - l.begin, from, from + units, x, partial, Plain{y, c.out.channel});
}

static void conv_lines(const Conv& c) {
  const bool join = joined(c) && c.out.channel > c.out.image;
  const int64_t lines = join ? 1 : c.images, size = join ? c.in.line(c.images) : c.rows.in * c.cols.in;
  const int64_t vectors = ceil_pos(size, V), groups = c.h->groups;
  const int64_t splits = std::min(vectors, std::max<int64_t>(1, ceil_pos(c.threads, lines * groups)));
  parallel(lines * groups * splits, c.threads, [&](int64_t task) {
    const int64_t part = task % splits, group = task / splits % groups, image = task / splits / groups;
    float* partial = scratch.get<float>(kPartial, c.group_rows() * kWidest * V);
    const bool clash = !c.offsets && channels_clash(c);
    float* near = clash ? scratch.get<float>(kPadded, c.h->channels * kWidest * V) : nullptr;
    const auto run = [&](int64_t begin, int64_t end) {
      // a dense line's last panel ends with it and may compute some pixels a second time
      const int64_t start = !join && end == vectors ? size - (end - begin) * V : begin * V;
      line_panel(c, {image, group, begin, end}, start, partial, near);
    };
    const int64_t begin = vectors * part / splits, end = vectors * (part + 1) / splits;
    const bool alone = !join && size % V != 0 && begin == 0 && end == vectors && vectors <= widest(c.w);
    panels(c.w, begin, alone ? end - 1 : end, run);
    if (alone) run(end - 1, end);
  });
  if (c.out.border == 0) return;
  for (int64_t row = 0; row < c.h->rows; ++row) {
    clear_before(c.out, row);
    clear_below(c.out, c.images - 1, row);
  }
}

}  // namespace sn
