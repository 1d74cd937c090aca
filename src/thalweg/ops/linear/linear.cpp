// Ops "linear", "norm_linear", "linear_add" and "linear_ggml" of few tokens, and of many in panels.
#include "int8.h"
#include "products.h"
#include "recording.h"

using namespace thalweg;

namespace {

template <class T, class N, class W>
void linear_of_few(
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

constexpr int64_t TOKENS = 16 * PANEL;  // that are packed at a time

template <class T, class N, class W>
void linear_of_many(
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

// segments 0: w is in the model's dtype, and there are no types and rows. rounds: whether x is rounded to 8 bits. many:
// in panels.
extern "C" void thalweg_linear(
    int dtype,
    const void* x,
    int64_t x_stride,
    const void* w,
    int segments,
    const int32_t* types,
    const int64_t* segment_rows,
    int rounds,
    int many,
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
  auto run = [&]<class T, class N, class W>(T, N, const W& matrix) {
    for (int64_t first = 0, some; first < tokens; first += some) {
      some = many && tokens - first > TOKENS ? TOKENS : tokens - first;
      (many ? linear_of_many<T, N, W> : linear_of_few<T, N, W>)(
          (const T*)x + first * x_stride, x_stride, matrix, (const N*)norm, eps,
          residual ? (const T*)residual + first * residual_stride : nullptr, residual_stride, (T*)y + first * y_stride,
          y_stride, some, columns, rows, threads);
    }
  };
  auto of_dtype = [&](auto matrix_of) {
    if (dtype == FLOAT32)
      run(float{}, float{}, matrix_of(float{}));
    else if (norm_dtype == FLOAT32)
      run(bf16{}, float{}, matrix_of(bf16{}));
    else
      run(bf16{}, bf16{}, matrix_of(bf16{}));
  };
  const BlockMatrix blocks{(const uint8_t*)w, columns, segments, types, segment_rows};
  if (!segments)
    of_dtype([&]<class T>(T) { return PlainMatrix<T>{(const T*)w, columns}; });
  else if (rounds)
    of_dtype([&](auto) { return RoundedMatrix{blocks}; });
  else
    of_dtype([&](auto) { return blocks; });
}

THALWEG_RECORDABLE(linear)
