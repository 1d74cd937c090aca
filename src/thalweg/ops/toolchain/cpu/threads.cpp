// A pool of threads that look for work for some microseconds before they sleep: a step has many short ops.
//
// Not OpenMP: torch brings a copy of its runtime, a second one would have threads of its own that spin beside the
// first one's, and neither survives a fork.
#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>

namespace thalweg {
namespace {

constexpr int SPINS = 4000;  // some 30 us

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Pool {
  std::atomic<uint32_t> epoch{0};  // moves on with every job
  std::atomic<bool> open{false};   // whether the job may be joined
  std::atomic<int> joined{0};
  std::atomic<int64_t> next{0};
  Task task;
  void* data;
  int64_t count;
  int wanted;  // threads besides the caller's
  int started = 0;

  void take() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(data, i);
  }

  void work(int index) {
    uint32_t seen = 0;
    for (;;) {
      int spins = 0;
      while (epoch.load() == seen && ++spins < SPINS) pause();
      if (epoch.load() == seen) epoch.wait(seen);
      seen = epoch.load();
      joined.fetch_add(1);
      // Whoever opened the job closes it before it counts who joined: an open one has not been counted yet.
      if (open.load() && index < wanted) take();
      joined.fetch_sub(1);
    }
  }

  void run(int threads, int64_t n, Task t, void* d) {
    while (started < threads - 1) {
      try {
        std::thread([this, index = started] { work(index); }).detach();
      } catch (const std::system_error&) {
        break;  // a limit of processes or memory: fewer do the same work
      }
      started++;
    }
    task = t, data = d, count = n, wanted = threads - 1;
    next.store(0);
    open.store(true);
    epoch.fetch_add(1);
    epoch.notify_all();
    take();
    open.store(false);
    for (int spins = 0; joined.load() != 0;) {
      if (++spins < SPINS)
        pause();
      else
        std::this_thread::yield();
    }
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
