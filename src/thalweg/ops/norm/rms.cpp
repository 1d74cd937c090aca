// Op "rms_norm".
#include "recording.h"
#include "rows.h"

using namespace thalweg;

namespace {

template <class T, class N>
void rms_norm(
    const T* x, int64_t x_stride, const N* weight, float eps, T* y, int64_t rows, int64_t columns, int threads) {
  parallel_for(worth(threads, 2 * rows * columns * (int64_t)sizeof(T)), rows, [&](int64_t t) {
    float* wide = scratch<1>(padded(columns));
    widen(x + t * x_stride, 0, weight, eps, 1, columns, wide);
    in_lanes(columns, [&](int64_t i, int64_t n) { store(y + t * columns + i, load(wide + i), n); });
  });
}

}  // namespace

extern "C" void thalweg_rms_norm(
    int dtype,
    const void* x,
    int64_t x_stride,
    int norm_dtype,
    const void* weight,
    float eps,
    void* y,
    int64_t rows,
    int64_t columns,
    int threads) {
  auto run = [&](auto t, auto n) {
    using T = decltype(t);
    using N = decltype(n);
    rms_norm((const T*)x, x_stride, (const N*)weight, eps, (T*)y, rows, columns, threads);
  };
  if (dtype == FLOAT32)
    norm_dtype == FLOAT32 ? run(float{}, float{}) : run(float{}, bf16{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

THALWEG_RECORDABLE(rms_norm)
