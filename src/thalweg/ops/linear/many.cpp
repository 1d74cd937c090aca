// Ops "linear", "norm_linear", "linear_add" and "linear_ggml" of many tokens.
#include "products.h"
#include "recording.h"

using namespace thalweg;

namespace {

constexpr int64_t TOKENS = 16 * PANEL;  // that are packed at a time

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
  const Products<T, W> by{w};
  const int64_t words = by.words(), panels = panels_of(tokens), chunk = rows_of_product(by.room());
  float* x_panels = scratch<0>(panels * words * PANEL);
  threads = worth_products(threads, tokens * columns * rows);
  parallel_for(threads, panels, [&](int64_t p) {
    const int64_t first = p * PANEL, count = tokens - first < PANEL ? tokens - first : PANEL;
    auto row = [&](int64_t t) { return x + (first + t) * x_stride; };
    by.pack(count, row, norm, eps, x_panels + p * words * PANEL);
  });
  // Threads share out rows, and panels too if there are too few rows for all.
  const int64_t chunks = (rows + chunk - 1) / chunk, wanted = (2 * threads + chunks - 1) / chunks;
  const int64_t parts = threads == 1 ? 1 : wanted < panels ? wanted : panels;
  parallel_for(threads, chunks * parts, [&](int64_t task) {
    const int64_t row = task / parts * chunk, count = rows - row < chunk ? rows - row : chunk;
    float* products = scratch<1>(chunk * (PANEL + by.room()));
    const auto of_task = by.rows(row, count, products + chunk * PANEL);
    for (int64_t p = task % parts * panels / parts; p < (task % parts + 1) * panels / parts; p++) {
      const int64_t first = p * PANEL, some = tokens - first < PANEL ? tokens - first : PANEL;
      by.product(of_task, count, x_panels + p * words * PANEL, vectors_of(some), products);
      unpack(products, count, some, [&](int64_t t, int64_t r, int64_t n, Vec v) {
        if (residual) v += load(residual + (first + t) * residual_stride + row + r, n);
        store(y + (first + t) * y_stride + row + r, v, n);
      });
    }
  });
}

}  // namespace

extern "C" void thalweg_linear_many(
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
    for (int64_t first = 0; first < tokens; first += TOKENS)
      linear<T, N>(
          (const T*)x + first * x_stride, x_stride, PlainMatrix<T>{(const T*)w, columns}, (const N*)norm, eps,
          residual ? (const T*)residual + first * residual_stride : nullptr, residual_stride, (T*)y + first * y_stride,
          y_stride, tokens - first < TOKENS ? tokens - first : TOKENS, columns, rows, threads);
  };
  if (dtype == FLOAT32)
    run(float{}, float{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

extern "C" void thalweg_linear_ggml_many(
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
    for (int64_t first = 0; first < tokens; first += TOKENS)
      linear<T, N>(
          (const T*)x + first * x_stride, x_stride, matrix, (const N*)norm, eps,
          residual ? (const T*)residual + first * residual_stride : nullptr, residual_stride, (T*)y + first * rows, rows,
          tokens - first < TOKENS ? tokens - first : TOKENS, columns, rows, threads);
  };
  const BlockMatrix exact{w, columns, segments, types, segment_rows};
  auto of_dtype = [&](const auto& matrix) {
    if (dtype == FLOAT32)
      run(float{}, float{}, matrix);
    else
      norm_dtype == FLOAT32 ? run(bf16{}, float{}, matrix) : run(bf16{}, bf16{}, matrix);
  };
  rounds ? of_dtype(RoundedMatrix{exact}) : of_dtype(exact);
}

THALWEG_RECORDABLE(linear_many)
THALWEG_RECORDABLE(linear_ggml_many)
