// Op "sample": the best of a row of logits, each with the Gumbel noise of its row's seed, position and its own index.
#include <limits>

#include "recording.h"
#include "rows.h"

using namespace thalweg;

namespace {

typedef uint64_t LVec __attribute__((vector_size(8 * LANES)));

constexpr int64_t CHUNK = 4096;  // entries of a task
constexpr float LEAST = -std::numeric_limits<float>::infinity();

template <class U>
inline U splitmix64(U x) {
  x = x + 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// -log(-log1p(-u)) of the uniform that a state gives. Winners have a small exponential -log1p(-u), so u is taken near
// 0, where float32 is fine.
inline Vec gumbel(LVec state) {
  UVec bits = __builtin_convertvector(splitmix64(state) >> 32, UVec);
  Vec u = (__builtin_convertvector(bits, Vec) + 0.5f) * 0x1p-32f;
  u = u < 1 - 0x1p-24f ? u : splat(1 - 0x1p-24f);
  Vec series = u * (1.f + u * (0.5f + u * (1.f / 3 + u * (0.25f + u * 0.2f))));
  Vec exact = -log(1.f - u);
  return -log(u < 0.03125f ? series : exact);
}

struct Best {
  float value;
  int64_t index;
  bool finite;
};

// Of entries first .. first + count; ties go to the lowest index.
template <class T>
Best best_of(const T* logits, int64_t first, int64_t count, float temperature, uint64_t row) {
  Vec best = splat(LEAST), odd = {};
  IVec where = {}, lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  LVec wide_lane = __builtin_convertvector(lane, LVec);
  const bool hot = temperature > 0;
  where = lane;
  in_lanes(count, [&](int64_t i, int64_t n) {
    Vec v = load(logits + first + i, n);
    odd += v - v;  // 0 of what is finite, NaN of all else
    v = v == v ? v : splat(LEAST);
    if (hot) v = v / temperature + gumbel(row + (uint64_t)(first + i) + wide_lane);
    IVec index = lane + (int32_t)i;
    IVec better = (v > best) & (index < (int32_t)count);
    best = better ? v : best;
    where = better ? index : where;
  });
  Best found{best[0], where[0], sum(odd) == 0.f};
  for (int i = 1; i < LANES; i++)
    if (best[i] > found.value || (best[i] == found.value && where[i] < found.index))
      found.value = best[i], found.index = where[i];
  if (found.value == LEAST) found.index = 0;  // none was better than nothing
  found.index += first;
  return found;
}

template <class T>
void sample(
    const T* logits,
    int64_t stride,
    const float* temperatures,
    const int64_t* seeds,
    const int64_t* positions,
    const int64_t* slots,
    bool check,
    int64_t* ids,
    int64_t rows,
    int64_t V,
    int threads) {
  const int64_t chunks = (V + CHUNK - 1) / CHUNK;
  Best* found = (Best*)scratch<0>(rows * chunks * (int64_t)(sizeof(Best) / 4 + 1));
  parallel_for(worth(threads, 16 * rows * V), rows * chunks, [&](int64_t task) {
    int64_t r = task / chunks, first = task % chunks * CHUNK, entry = slots ? slots[r] : r;
    uint64_t row = splitmix64(splitmix64((uint64_t)seeds[entry]) + (uint64_t)positions[r]);
    int64_t count = V - first < CHUNK ? V - first : CHUNK;
    found[task] = best_of(logits + r * stride, first, count, temperatures[entry], row);
  });
  for (int64_t r = 0; r < rows; r++) {
    Best best = found[r * chunks];
    for (int64_t c = 1; c < chunks; c++) {
      Best& next = found[r * chunks + c];
      bool finite = best.finite && next.finite;
      if (next.value > best.value) best = next;
      best.finite = finite;
    }
    ids[r] = check && !best.finite ? -1 : best.index;
  }
}

}  // namespace

extern "C" void thalweg_sample(
    int dtype,
    const void* logits,
    int64_t stride,
    const float* temperatures,
    const int64_t* seeds,
    const int64_t* positions,
    const int64_t* slots,
    int check,
    int64_t* ids,
    int64_t rows,
    int64_t V,
    int threads) {
  auto run = [&](auto t) {
    using T = decltype(t);
    sample<T>((const T*)logits, stride, temperatures, seeds, positions, slots, check != 0, ids, rows, V, threads);
  };
  dtype == FLOAT32 ? run(float{}) : run(bf16{});
}

THALWEG_RECORDABLE(sample)
