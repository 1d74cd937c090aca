// A pool of threads that look for work for some microseconds before they sleep: a step has many short ops.
//
// Not OpenMP: torch brings a copy of its runtime, a second one would have threads of its own that spin beside the
// first one's, and neither survives a fork.
#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>

namespace thalweg {
namespace {

constexpr auto PATIENCE = std::chrono::microseconds(30);  // that a thread looks for work before it sleeps
constexpr int LOOKS = 32;                                 // between two looks at the clock
constexpr int WANTED_BITS = 12, BELLS = WANTED_BITS + 1;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `there()` came true within PATIENCE: how long a pause takes differs by a factor of five between processors.
template <class F>
inline bool look_for(F&& there) {
  const auto end = std::chrono::steady_clock::now() + PATIENCE;
  do {
    for (int i = 0; i < LOOKS; i++) {
      if (there()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

struct Pool {
  // Moves on with every job. Its lowest bits say how many threads besides the caller's are wanted: the others of a
  // machine with many neither join nor wake.
  alignas(64) std::atomic<uint64_t> epoch{0};
  alignas(64) std::atomic<int> joined{0};
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<bool> open{false};  // whether the job may be joined
  Task task;
  void* data;
  int64_t count;
  int started = 0;
  std::atomic<uint32_t> bells[BELLS] = {};  // that threads sleep by: bell b is for threads 2^b - 1 and on

  static int bell_of(int index) {
    int bell = 0;
    while ((index + 1) >> (bell + 1)) bell++;
    return bell;
  }

  void take() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(data, i);
  }

  void work(int index) {
    std::atomic<uint32_t>& bell = bells[bell_of(index)];
    for (uint64_t seen = 0;;) {
      while (!look_for([&] { return epoch.load(std::memory_order_acquire) != seen; })) {
        uint32_t rung = bell.load();
        if (epoch.load() == seen) bell.wait(rung);
        if (epoch.load() != seen) break;
      }
      seen = epoch.load();
      if (index >= (int)(seen & ((1 << WANTED_BITS) - 1))) continue;
      joined.fetch_add(1);
      // Whoever opened the job closes it before it counts who joined: an open one has not been counted yet. It may be a
      // later one than was seen, which works as well.
      if (open.load()) take();
      joined.fetch_sub(1);
    }
  }

  void run(int threads, int64_t n, Task t, void* d) {
    threads = threads < 1 << WANTED_BITS ? threads : (1 << WANTED_BITS) - 1;
    while (started < threads - 1) {
      try {
        std::thread([this, index = started] { work(index); }).detach();
      } catch (const std::system_error&) {
        break;  // a limit of processes or memory: fewer do the same work
      }
      started++;
    }
    const uint64_t wanted = threads - 1 < started ? threads - 1 : started;
    task = t, data = d, count = n;
    next.store(0);
    open.store(true);
    epoch.store(((epoch.load() >> WANTED_BITS) + 1) << WANTED_BITS | wanted);
    for (int bell = 0; wanted >= (uint64_t)1 << bell; bell++) {
      bells[bell].fetch_add(1);
      bells[bell].notify_all();
    }
    take();
    open.store(false);
    if (!look_for([&] { return joined.load() == 0; }))
      while (joined.load() != 0) std::this_thread::yield();
  }
};

std::atomic<Pool*> pool{nullptr};
std::atomic<bool> busy{false};

// A child has none of its parent's threads: it begins with a new pool.
void forget() {
  pool.store(nullptr);
  busy.store(false);
}

}  // namespace

void run_tasks(int threads, int64_t count, Task task, void* data) {
  if (busy.exchange(true)) {
    for (int64_t i = 0; i < count; i++) task(data, i);
    return;
  }
  Pool* p = pool.load();
  if (!p) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget);
    (void)registered;
    pool.store(p = new Pool);  // never deleted: its threads may wait in it until the process is gone
  }
  p->run(threads, count, task, data);
  busy.store(false);
}

}  // namespace thalweg
