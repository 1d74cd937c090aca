// Ops "linear", "norm_linear", "linear_add" and "linear_ggml" of few tokens.
#include "int8.h"
#include "recording.h"

using namespace thalweg;

namespace {

template <class T, class N, class W>
void linear(
    const T* x,
    int64_t x_stride,
    const W& w,
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
  const int64_t stride = padded(columns), chunk = rows_of_task(w.row_bytes());
  float* wide = scratch<0>(tokens * stride);
  widen(x, x_stride, norm, eps, tokens, columns, wide);
  if constexpr (requires { w.round(wide); })
    for (int64_t t = 0; t < tokens; t++) w.round(wide + t * stride);
  threads = worth(threads, rows * w.row_bytes());
  parallel_for(threads, (rows + chunk - 1) / chunk, [&](int64_t c) {
    int64_t first = c * chunk, count = rows - first < chunk ? rows - first : chunk;
    float* sums = scratch<1>(tokens * chunk);
    w.times(first, count, wide, stride, tokens, sums, chunk);
    for (int64_t t = 0; t < tokens; t++)
      in_lanes(count, [&](int64_t r, int64_t n) {
        Vec v = load(sums + t * chunk + r, n);
        if (residual) v += load(residual + t * residual_stride + first + r, n);
        store(y + t * y_stride + first + r, v, n);
      });
  });
}

}  // namespace

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
  auto run = [&](auto t, auto n) {
    using T = decltype(t);
    using N = decltype(n);
    linear<T, N>(
        (const T*)x, x_stride, PlainMatrix<T>{(const T*)w, columns}, (const N*)norm, eps, (const T*)residual,
        residual_stride, (T*)y, y_stride, tokens, columns, rows, threads);
  };
  if (dtype == FLOAT32)
    run(float{}, float{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

extern "C" void thalweg_linear_ggml(
    int dtype,
    const void* x,
    int64_t x_stride,
    const uint8_t* w,
    int segments,
    const int32_t* types,
    const int64_t* segment_rows,
    int rounds,
    int norm_dtype,
    const void* norm,
    float eps,
    const void* residual,
    int64_t residual_stride,
    void* y,
    int64_t tokens,
    int64_t columns,
    int64_t rows,
    int threads) {
  auto run = [&](auto t, auto n, const auto& matrix) {
    using T = decltype(t);
    using N = decltype(n);
    linear<T, N>(
        (const T*)x, x_stride, matrix, (const N*)norm, eps, (const T*)residual, residual_stride, (T*)y, rows, tokens,
        columns, rows, threads);
  };
  const BlockMatrix plain{w, columns, segments, types, segment_rows};
  auto of_dtype = [&](const auto& matrix) {
    if (dtype == FLOAT32)
      run(float{}, float{}, matrix);
    else
      norm_dtype == FLOAT32 ? run(bf16{}, float{}, matrix) : run(bf16{}, bf16{}, matrix);
  };
  rounds ? of_dtype(RoundedMatrix{plain}) : of_dtype(plain);
}

THALWEG_RECORDABLE(linear)
THALWEG_RECORDABLE(linear_ggml)
