// A list of calls that Python recorded (ops/toolchain/cpu_recording.py), made again one after another.
#include "recording.h"

namespace {

struct Call {
  int (*function)(const char* slots);
  const char* slots;
};

}  // namespace

// Returns how many calls succeeded before one failed; `count` if none did.
extern "C" int64_t thalweg_replay(const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (!calls[i].function(calls[i].slots)) return i;
  return count;
}
