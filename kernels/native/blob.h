// The packed weight as kernels/blob.py writes it, and the list of blobs whose columns were checked.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>

namespace sn {

enum Status : int { kOk = 0, kMalformed = 1, kMismatch = 2, kUnchecked = 3 };
enum Dtype : int { kFloat32, kBfloat16 };  // of stored values; sums are float32
enum Operation : int { kLinear = 1, kConv2d, kPool, kMean, kMap, kZero };

struct Header {
  char magic[8];
  int32_t version, operation;
  int64_t bytes;
  uint32_t crc;
  int32_t rows, channels, kernel_h, kernel_w, groups;
  int32_t block, chunk, chunks, entries, nonzeros, slices, steps, dtype, ordered, spare;
  int64_t order, starts, columns, values;                   // byte offsets of the rows' sections
  int64_t slice_starts, slice_bases, slice_lanes, slice_values;  // and of the sliced sections
};
static_assert(sizeof(Header) == 152, "kernels/blob.py writes 152 bytes");

enum Kind : int32_t { kFrom, kTo, kLine, kDense, kPixels };  // a tensor: x, y, lines, dense between steps, lanes

struct Tensor {
  int32_t kind, channels, height, width, pitch, border;
  int64_t offset, channel, image;  // floats: of the first pixel in the arena, and from one to the next
};
static_assert(sizeof(Tensor) == 48, "kernels/network/program.py writes 48 bytes");

struct Step {
  int32_t operation, activation, in, other, out, at;  // tensors, -1: none; first channel written
  int32_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, kind, run;
  int64_t weight, bias, offsets, inside;  // byte offsets in the program, -1: none
};
static_assert(sizeof(Step) == 96, "kernels/network/program.py writes 96 bytes");

struct Program {
  char magic[8];
  int32_t version, tensors;
  int64_t bytes;
  uint32_t crc;
  int32_t steps, images, parts;  // images of a group; parts of an image in the lanes of a pixel, 0: no lanes
  int64_t arena, padding[2];        // floats
};
static_assert(sizeof(Program) == 64, "kernels/network/program.py writes 64 bytes");

template <class T>
static inline const T* at(const void* base, int64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const char*>(base) + offset);
}

// the row at each place of the sections; null: its number
static inline const int32_t* order_of(const Header& h) { return h.ordered ? at<int32_t>(&h, h.order) : nullptr; }

// A blob is named by place, size and checksum; the full check is Python's and is done once for each.
class Checked {
 public:
  static uint64_t name(const void* blob, int64_t bytes, uint32_t crc) {
    uint64_t h = reinterpret_cast<uintptr_t>(blob) * 0x9E3779B97F4A7C15ull;
    h = (h ^ (h >> 29) ^ static_cast<uint64_t>(bytes)) * 0xBF58476D1CE4E5B9ull;
    h = (h ^ (h >> 32) ^ crc) * 0x94D049BB133111EBull;
    return (h ^ (h >> 31)) | 1;
  }
  bool has(uint64_t name) const { return slots_[name >> 52].load(std::memory_order_relaxed) == name; }
  void add(uint64_t name) { slots_[name >> 52].store(name, std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> slots_[4096] = {};
};
static Checked checked;

static inline Status check(const void* data, int64_t bytes, const char* magic, int64_t head) {
  if (bytes < head || std::memcmp(data, magic, 8) != 0) return kMalformed;
  if (*at<int64_t>(data, 16) != bytes) return kMalformed;
  return checked.has(Checked::name(data, bytes, *at<uint32_t>(data, 24))) ? kOk : kUnchecked;
}
static inline Status check_weight(const void* data, int64_t bytes) {
  return check(data, bytes, "SNWEIGHT", sizeof(Header));
}
static inline Status check_program(const void* data, int64_t bytes) {
  return check(data, bytes, "SNGRAPH\n", sizeof(Program));
}

}  // namespace sn
