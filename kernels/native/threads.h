// Threads are those of the OpenMP runtime that torch has loaded; its entry points are handed in.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>

namespace sn {

typedef void (*Fork)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
typedef int (*Count)();
static Fork fork_team = nullptr;
static Count thread_number = nullptr, team_size = nullptr;

// body(task) for every task, in contiguous shares; what a task writes may not depend on the shares.
template <class Body>
static void parallel(int64_t tasks, int threads, const Body& body) {
  struct Job {
    const Body* body;
    int64_t tasks;
  } job{&body, tasks};
  const int64_t team = std::min<int64_t>(threads, tasks);
  if (team <= 1 || !fork_team) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  fork_team(
      [](void* data) {
        const Job& job = *static_cast<Job*>(data);
        const int64_t me = thread_number(), all = team_size();
        for (int64_t i = job.tasks * me / all; i < job.tasks * (me + 1) / all; ++i) (*job.body)(i);
      },
      &job, static_cast<unsigned>(team), 0);
}

// Threads worth waking for so many multiply-adds: a team that is woken costs some ten microseconds.
static inline int useful_threads(int threads, double multiply_adds) {
  constexpr double each = 1 << 19;
  return static_cast<int>(std::max(1., std::min<double>(threads, multiply_adds / each)));
}
constexpr double kTouch = 8;  // multiply-adds in the time of a float that is read, changed and written

static bool poison = false;  // tests: fill scratch with NaN, so that a value never written shows

// Scratch that each thread keeps between calls, one buffer for each purpose.
enum Purpose { kArena, kValues, kPing, kPong, kCall, kPadded, kPartial, kSegments, kPerms, kPurposes };

class Scratch {
 public:
  ~Scratch() {
    for (void* p : data_) std::free(p);
  }
  template <class T>
  T* get(Purpose purpose, int64_t count) {
    const size_t bytes = (static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T) + 127) / 64 * 64;
    if (bytes > size_[purpose]) {
      std::free(data_[purpose]);
      data_[purpose] = std::aligned_alloc(64, bytes);
      if (!data_[purpose]) std::abort();
      size_[purpose] = bytes;
    }
    T* p = static_cast<T*>(data_[purpose]);
    if (poison) std::fill_n(reinterpret_cast<float*>(p), bytes / 4, std::numeric_limits<float>::quiet_NaN());
    return p;
  }

 private:
  void* data_[kPurposes] = {};
  size_t size_[kPurposes] = {};
};
static thread_local Scratch scratch;

}  // namespace sn
