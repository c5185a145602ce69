// Sparse convolution on views. Where outputs lie as their inputs do it reads in place (lines.h). Otherwise it copies a
// band of rows (or several images) of one group into padded planes, in which every tap is one offset and outputs lie
// in one line with a few lanes between rows that nobody stores.
#pragma once
#include "axis.h"
#include "panel.h"
#include "threads.h"
#include "view.h"

namespace sn {

struct Conv {
  const Header* h;
  View in, out;
  int64_t images;
  Axis rows, cols;
  Rows w;
  int threads;
  View other{};                       // added to the sums, laid out as `out`; base null: nothing is
  const int32_t* offsets = nullptr;   // of the non-zeros on lines, where they are known ahead
  const int32_t* inside = nullptr;    // by position of a line: -1 on a pixel, 0 between pixels

  int64_t group_rows() const { return h->rows / h->groups; }
  double multiply_adds() const {
    return static_cast<double>(h->entries) * h->block * static_cast<double>(rows.out * cols.out * images);
  }
};

// --- padded planes

struct Layout {
  int64_t images, band;           // of one task: several images whole, or one image's band of rows
  int64_t pitch, image_rows;      // floats from row to row, rows from image to image
  int64_t phases_w, phases, plane, channel;  // floats of a phase plane and of a channel
  int64_t line(int64_t images_, int64_t rows, int64_t width) const {
    return ((images_ - 1) * image_rows + rows - 1) * pitch + width;
  }
};

static Layout layout(const Conv& c, int64_t images, int64_t band) {
  Layout l{images, band, 0, 0, c.cols.phases(), 0, 0, 0};
  l.pitch = c.cols.out + c.cols.reach() - c.cols.shared();
  l.image_rows = band + c.rows.reach() - (images > 1 ? c.rows.shared() : 0);
  l.phases = l.phases_w * c.rows.phases();
  const int64_t read = l.line(images, band, c.cols.out) + kWidest * V + c.rows.reach() * l.pitch + c.cols.reach();
  const int64_t written = (images * l.image_rows + c.rows.shared()) * l.pitch + c.cols.shared() + V;
  l.plane = (std::max(read, written) + 15) / 16 * 16;
  l.channel = l.phases * l.plane;
  if (l.channel / 16 % 2 == 0) l.channel += 16;  // an odd number of cache lines: no two channels clash
  return l;
}

// The largest band (or number of images) whose planes stay near the core, small enough to give
// every thread some.
static Layout choose_layout(const Conv& c) {
  constexpr int64_t near = 96 * 1024;  // floats
  const int64_t images = std::min<int64_t>(ceil_pos(c.images, c.threads), c.images);
  const int64_t bands = ceil_pos(c.threads, c.images * c.h->groups);
  int64_t band = std::max<int64_t>(1, c.rows.out / bands);
  const auto size = [&](int64_t i, int64_t b) { return layout(c, i, b).channel * c.h->channels; };
  const int64_t one = size(1, band);
  if (band == c.rows.out && one <= near) return layout(c, std::max<int64_t>(1, std::min(images, near / one)), band);
  while (band > 4 && size(1, band) > near) band = (band + 1) / 2;
  return layout(c, 1, band);
}

// n floats, n < V
static inline void copy_few(float* to, const float* from, int64_t n) {
  typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
  if (n < 4) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + 4 <= n; i += 4) *(v4*)(to + i) = *(const v4*)(from + i);
  *(v4*)(to + n - 4) = *(const v4*)(from + n - 4);
}

// `first` zeros, the data, and zeros up to width. May write V floats beyond: lines are written in order.
static inline void fill_line(float* to, const float* from, int64_t first, int64_t last, int64_t width, int64_t stride) {
  for (int64_t i = 0; i < first; i += V) store(to + i, vf{});
  const int64_t n = last - first;
  if (stride == 2) {
    for (int64_t i = 0; i < n; i += V) store(to + first + i, load<2>(from + 2 * i, 2, column<2>(0, n - i), vf{}));
  } else if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) to[first + i] = from[i * stride];
  } else if (n < V) {
    copy_few(to + first, from, n);
  } else {
    for (int64_t i = 0; i + V <= n; i += V) store(to + first + i, load(from + i));
    store(to + last - V, load(from + n - V));
  }
  for (int64_t i = last; i < width; i += V) store(to + i, vf{});
}

// one phase plane of one channel: images [image, image + count), rows of the band that starts at `top`
static void fill_plane(const Conv& c, const Layout& l, int64_t channel, int64_t image, int64_t count, int64_t top,
                       int64_t phase_h, int64_t phase_w, float* to) {
  const int64_t full = l.pitch + c.cols.shared();
  const int64_t first = std::min(c.cols.first(phase_w), full);
  const int64_t last = std::max(first, std::min(c.cols.last(phase_w), full));
  for (int64_t n = 0; n < count; ++n) {
    const float* plane = c.in.at(image + n, channel);
    const int64_t lines = l.image_rows + (n + 1 == count && l.images > 1 ? c.rows.shared() : 0);
    for (int64_t r = 0; r < lines; ++r, to += l.pitch) {
      const int64_t source = c.rows.source(phase_h, top + r);
      const bool real = source >= 0 && source < c.rows.in;
      const float* from = real ? plane + source * c.in.pitch + c.cols.source(phase_w, first) : nullptr;
      fill_line(to, from, real ? first : full, real ? last : full, full, c.cols.stride);
    }
  }
}

static void fill(const Conv& c, const Layout& l, int64_t group, int64_t image, int64_t count, int64_t top, float* to) {
  for (int64_t ch = 0; ch < c.h->channels; ++ch, to += l.channel)
    for (int64_t a = 0; a < c.rows.stride; ++a)
      for (int64_t b = 0; c.rows.uses(a) && b < c.cols.stride; ++b)
        if (c.cols.uses(b))
          fill_plane(c, l, group * c.h->channels + ch, image, count, top, a, b,
                     to + (c.rows.rank(a) * l.phases_w + c.cols.rank(b)) * l.plane);
}

// offsets of the non-zeros in the padded planes
static int32_t* place(const Conv& c, const Layout& l) {
  const int64_t taps = c.rows.taps * c.cols.taps, columns = c.h->channels * taps;
  int32_t* offsets = scratch.get<int32_t>(kCall, c.h->entries + columns);
  int32_t* table = offsets + c.h->entries;
  for (int64_t i = 0; i < c.rows.taps; ++i)
    for (int64_t j = 0; j < c.cols.taps; ++j) {
      const int64_t phase = c.rows.rank(c.rows.phase(i)) * l.phases_w + c.cols.rank(c.cols.phase(j));
      const int64_t at = phase * l.plane + c.rows.shift(i) * l.pitch + c.cols.shift(j);
      for (int64_t ch = 0; ch < c.h->channels; ++ch)
        table[ch * taps + i * c.cols.taps + j] = static_cast<int32_t>(ch * l.channel + at);
    }
  for (int64_t i = 0; i < c.h->entries; ++i) offsets[i] = table[c.w.offsets[i]];
  return offsets;
}

// Lanes of a vector that lie together in the output: `count` of them, brought to the front by a permutation.
// Vector v has segment v first; `next` is another of the same vector, 0: none.
struct Segment {
  int64_t out;
  int32_t next;
  int16_t count, whole;  // whole: a full store is allowed, what follows is written later
};

struct Segments {
  Segment* segment;
  int32_t* perm;
};

static Segments segments(const Conv& c, const Layout& l, int64_t image, int64_t count, int64_t top, int64_t rows) {
  const int64_t vectors = ceil_pos(l.line(count, rows, c.cols.out), V), most = vectors + count * rows;
  Segments s{scratch.get<Segment>(kSegments, most), scratch.get<int32_t>(kPerms, most * V)};
  std::memset(s.segment, 0, static_cast<size_t>(most) * sizeof(Segment));
  std::memset(s.perm, 0, static_cast<size_t>(most * V) * sizeof(int32_t));
  int64_t used = vectors, now = 0;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t base = (image + n) * c.out.image, end = base + (top + rows - 1) * c.out.pitch + c.cols.out;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t out = base + (top + r) * c.out.pitch;
      const int64_t start = (n * l.image_rows + r) * l.pitch, stop = start + c.cols.out;
      for (int64_t p = start; p < stop;) {
        const int64_t vector = p / V, upto = std::min(stop, (vector + 1) * V);
        if (s.segment[vector].count == 0) now = vector;
        else if (s.segment[now].out + s.segment[now].count != out)
          s.segment[now].next = static_cast<int32_t>(used), now = used++;
        Segment& seg = s.segment[now];
        if (seg.count == 0) seg = {out, 0, 0, out + V <= end};
        for (; p < upto; ++p, ++out) s.perm[now * V + seg.count++] = static_cast<int32_t>(p - vector * V);
      }
    }
  }
  return s;
}

struct Scatter {
  float* y;
  int64_t plane, vector;
  Segments s;
  static constexpr bool kAtOnce = false;
  void one(int64_t row, int v, vf sum) const {
    float* to = y + row * plane;
    int64_t i = vector + v;
    do {
      part(to, sum, i);
    } while ((i = s.segment[i].next));
  }
  void part(float* to, vf sum, int64_t i) const {
    const Segment& seg = s.segment[i];
    const vf lanes = permute(sum, s.perm + i * V);
    if (seg.whole) store(to + seg.out, lanes);
    else std::memcpy(to + seg.out, &lanes, static_cast<size_t>(seg.count) * 4);
  }
};

static void conv_padded(const Conv& c) {
  const Layout l = choose_layout(c);
  const int64_t bands = ceil_pos(c.rows.out, l.band), places = ceil_pos(c.images, l.images) * bands;
  const int64_t shares = std::min<int64_t>(c.h->groups, ceil_pos(c.threads, places));
  const int units = static_cast<int>(c.group_rows() / c.h->block);
  Rows w = c.w;
  w.offsets = place(c, l);
  parallel(places * shares, c.threads, [&, w](int64_t task) {
    const int64_t share = task % shares, top = task / shares % bands * l.band;
    const int64_t image = task / shares / bands * l.images, count = std::min(l.images, c.images - image);
    const int64_t rows = std::min(l.band, c.rows.out - top);
    const Segments s = segments(c, l, image, count, top, rows);
    const int64_t vectors = ceil_pos(l.line(count, rows, c.cols.out), V);
    float* planes = scratch.get<float>(kPadded, c.h->channels * l.channel);
    float* partial = scratch.get<float>(kPartial, c.group_rows() * kWidest * V);
    for (int64_t g = c.h->groups * share / shares; g < c.h->groups * (share + 1) / shares; ++g) {
      fill(c, l, g, image, count, top, planes);
      panels(w, 0, vectors, [&](int64_t begin, int64_t end) {
        any_panel(w, end - begin, static_cast<int>(g) * units, static_cast<int>(g + 1) * units, planes + begin * V,
                  partial, Scatter{c.out.base, c.out.channel, begin, s});
      });
    }
  });
  if (c.out.border == 0) return;
  parallel(c.h->rows, c.threads, [&](int64_t row) {
    for (int64_t n = 0; n < c.images; ++n) clear_around(c.out, n, row);
  });
}

}  // namespace sn
