// driver CORE PLACE CASES RESULTS: calls a compiled core on the cases that tests/kernels/driver.py writes, each array
// in memory of exactly its size: on the heap, for AddressSanitizer, or with a forbidden page right behind or before it.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

struct Case {
  int64_t operation, x, blob, bias, y;  // sizes in bytes; bias -1: none
  int64_t activation, threads, numbers[16];
};

[[noreturn]] static void fail(const std::string& why) {
  std::fprintf(stderr, "driver: %s\n", why.c_str());
  std::exit(2);
}

class Memory {
 public:
  Memory(const std::string& place, int64_t size) : bytes(static_cast<size_t>(size < 0 ? 0 : size)) {
    if (size < 0) return;
    if (place == "heap") {
      data = heap_ = std::malloc(bytes);
    } else {
      const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), room = (bytes / page + 1) * page;
      mapped_ = room + 2 * page;
      map_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (map_ == MAP_FAILED || mprotect(map_ + page, room, PROT_READ | PROT_WRITE)) fail("no memory");
      data = map_ + page + (place == "end" ? room - bytes : 0);
    }
    std::memset(data, 0xff, bytes);  // floats: NaN
  }
  Memory(const std::string& place, int64_t size, std::FILE* from) : Memory(place, size) {
    if (std::fread(data, 1, bytes, from) != bytes) fail("a case ends early");
  }
  Memory(const Memory&) = delete;
  ~Memory() {
    std::free(heap_);
    if (map_) munmap(map_, mapped_);
  }

  const size_t bytes;
  void* data = nullptr;

 private:
  void* heap_ = nullptr;
  char* map_ = nullptr;
  size_t mapped_ = 0;
};

// a team whose members run one after the other: work is shared out as among threads
static int member = 0, members = 1;
static void fork_team(void (*body)(void*), void* data, unsigned threads, unsigned) {
  members = static_cast<int>(threads);
  for (member = 0; member < members; ++member) body(data);
}
static int team_member() { return member; }
static int team_size() { return members; }

static void* core;
template <class Result = int, class... Arguments>
static Result call(const char* name, Arguments... arguments) {
  void* function = dlsym(core, name);
  if (!function) fail(dlerror());
  return reinterpret_cast<Result (*)(Arguments...)>(function)(arguments...);
}

static int run(const Case& c, const Memory& x, const Memory& blob, const Memory& bias, const Memory& y) {
  const int64_t* n = c.numbers;
  const int activation = static_cast<int>(c.activation), threads = static_cast<int>(c.threads);
  const int64_t bytes = c.blob;
  switch (c.operation) {
    case 0: return call("sn_linear", x.data, n[0], n[1], blob.data, bytes, bias.data, y.data, n[2], activation, threads);
    case 1: return call("sn_conv2d", x.data, n, blob.data, bytes, bias.data, y.data, activation, threads);
    default:
      return call("sn_program", x.data, n, blob.data, bytes, y.data, n + 4, threads, static_cast<int64_t*>(nullptr));
  }
}

int main(int count, char** words) {
  if (count != 5) fail("CORE PLACE CASES RESULTS");
  core = dlopen(words[1], RTLD_NOW);
  if (!core) fail(dlerror());
  const std::string place = words[2];
  std::FILE *cases = std::fopen(words[3], "rb"), *results = std::fopen(words[4], "wb");
  if (!cases || !results) fail("cannot open the cases or the results");
  call<void>("sn_poison", 1);
  call<void>("sn_threads", &fork_team, &team_member, &team_size);
  int number = 0;
  for (Case c; std::fread(&c, sizeof c, 1, cases) == 1; ++number) {
    std::fprintf(stderr, "driver: case %d\n", number);
    const Memory x(place, c.x, cases), blob(place, c.blob, cases), bias(place, c.bias, cases), y(place, c.y);
    call<void>("sn_checked", blob.data, c.blob);
    int status = 0;
    std::thread([&] { status = run(c, x, blob, bias, y); }).join();  // its scratch is new
    if (status) fail("the core refuses a case: status " + std::to_string(status));
    std::fwrite(y.data, 1, y.bytes, results);
  }
  return std::fclose(results) ? 2 : 0;
}
