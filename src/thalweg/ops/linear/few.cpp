// Ops "linear", "norm_linear" and "linear_add" of few tokens.
#include "rows.h"

using namespace thalweg;

namespace {

template <class T, class N>
void linear(
    const T* x,
    int64_t x_stride,
    const T* w,
    const N* norm,
    float eps,
    const T* residual,
    int64_t residual_stride,
    T* y,
    int64_t y_stride,
    int64_t tokens,
    int64_t columns,
    int64_t rows,
    int threads) {
  const int64_t stride = padded(columns), CHUNK = rows_of_task(columns * sizeof(T));
  float* wide = scratch<0>(tokens * stride);
  widen(x, x_stride, norm, eps, tokens, columns, wide);
  int64_t chunks = (rows + CHUNK - 1) / CHUNK;
  threads = worth(threads, rows * columns * (int64_t)sizeof(T));
  parallel_for(threads, chunks, [&](int64_t c) {
    int64_t first = c * CHUNK, count = rows - first < CHUNK ? rows - first : CHUNK;
    float* sums = scratch<1>(tokens * CHUNK);
    rows_times(w + first * columns, count, columns, wide, stride, tokens, sums, CHUNK);
    for (int64_t t = 0; t < tokens; t++)
      in_lanes(count, [&](int64_t r, int64_t n) {
        Vec v = load(sums + t * CHUNK + r, n);
        if (residual) v += load(residual + t * residual_stride + first + r, n);
        store(y + t * y_stride + first + r, v, n);
      });
  });
}

}  // namespace

#define ARGUMENTS(T, N)                                                                                      \
  (const T*)x, x_stride, (const T*)w, (const N*)norm, eps, (const T*)residual, residual_stride, (T*)y, y_stride, \
      tokens, columns, rows, threads

extern "C" void thalweg_linear(
    int dtype,
    const void* x,
    int64_t x_stride,
    const void* w,
    int norm_dtype,
    const void* norm,
    float eps,
    const void* residual,
    int64_t residual_stride,
    void* y,
    int64_t y_stride,
    int64_t tokens,
    int64_t columns,
    int64_t rows,
    int threads) {
  if (dtype == FLOAT32)
    linear<float, float>(ARGUMENTS(float, float));
  else if (norm_dtype == FLOAT32)
    linear<bf16, float>(ARGUMENTS(bf16, float));
  else
    linear<bf16, bf16>(ARGUMENTS(bf16, bf16));
}
