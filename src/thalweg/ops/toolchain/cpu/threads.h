// Work shared out over threads that wait for it, and memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace thalweg {

typedef void (*Task)(void* data, int64_t index);

// task(data, i) for every i below count, on at most `threads` threads, the caller's among them; returns when all are
// done. If another caller has the threads, this one does all by itself.
void run_tasks(int threads, int64_t count, Task task, void* data);

template <class F>
inline void parallel_for(int threads, int64_t count, F&& f) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; i++) f(i);
    return;
  }
  run_tasks(threads, count, [](void* data, int64_t i) { (*(decltype(&f))data)(i); }, (void*)&f);
}

// How many of `threads` are worth waking for so many bytes that are read.
inline int worth(int threads, int64_t bytes) {
  int64_t most = bytes / (64 << 10) + 1;
  return most < threads ? (int)most : threads;
}

// Room for `count` floats, on a cache line's boundary, that this thread's next call for the same purpose takes again.
template <int PURPOSE>
inline float* scratch(int64_t count) {
  struct Room {
    float* at = nullptr;
    int64_t size = 0;
    ~Room() { free(at); }
  };
  static thread_local Room room;
  if (room.size < count) {
    free(room.at);
    room.size = (count + 1023) / 1024 * 1024;
    room.at = (float*)aligned_alloc(64, 4 * room.size);
    if (!room.at) abort();
  }
  return room.at;
}

}  // namespace thalweg
