// Products of a few rows of activations with the rows of a weight, which lie one after the other in memory.
//
// A sum runs over the columns in one order, whatever the number of rows, of tokens or of threads: a token has the same
// bits alone and in a batch.
#pragma once

#include "threads.h"
#include "vectors.h"

namespace thalweg {

constexpr int64_t AHEAD = 16 << 10;  // bytes

inline int64_t padded(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

// out[t * out_stride + r] for R rows (a multiple of 4) and N tokens; x is padded with zeros to whole vectors of X, which
// is float or, where PAIRS, bf16 as w is.
template <int R, int N, class T, class X>
inline void tile(const T* w, int64_t columns, const X* x, int64_t x_stride, float* out, int64_t out_stride) {
  // The processor's own prefetching does not see that the next rows follow: twice the rate from memory for 8 tokens.
  const int64_t ahead = AHEAD / (columns * (int64_t)sizeof(T)) > R ? AHEAD / sizeof(T) : R * columns;
  Vec acc[R][N] = {};
  int64_t k = 0;
  for (; k + STEP<X> <= columns; k += STEP<X>) {
    Vec wk[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      wk[r] = operands<X>(w + r * columns + k);
      __builtin_prefetch(w + r * columns + k + ahead);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      Vec xk = operands<X>(x + n * x_stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][n] = add_product<X>(acc[r][n], wk[r], xk);
    }
  }
  if (k < columns)
    for (int r = 0; r < R; r++) {
      Vec wk = some_operands<X>(w + r * columns + k, columns - k);
      for (int n = 0; n < N; n++) acc[r][n] = add_product<X>(acc[r][n], wk, operands<X>(x + n * x_stride + k));
    }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r += 4)
      sum4(acc[r][n], acc[r + 1][n], acc[r + 2][n], acc[r + 3][n], out + n * out_stride + r);
}

constexpr int64_t NEAR_TOKENS = 8;  // whose activations stay in the nearest cache

template <int R, class T, class X>
inline void tokens_of_tile(
    const T* w, int64_t columns, const X* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) tile<R, 4>(w, columns, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
  for (; t + 2 <= tokens; t += 2) tile<R, 2>(w, columns, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
  if (t < tokens) tile<R, 1>(w, columns, x + t * x_stride, x_stride, out + t * out_stride, out_stride);
}

// out[t * out_stride + r] = x[t] . w[r] for `rows` rows of w and `tokens` rows of x.
template <class T, class X>
inline void rows_times(
    const T* w,
    int64_t rows,
    int64_t columns,
    const X* x,
    int64_t x_stride,
    int64_t tokens,
    float* out,
    int64_t out_stride) {
  for (; tokens > NEAR_TOKENS; tokens -= NEAR_TOKENS, x += NEAR_TOKENS * x_stride, out += NEAR_TOKENS * out_stride)
    rows_times(w, rows, columns, x, x_stride, NEAR_TOKENS, out, out_stride);
  int64_t r = 0;
  if (tokens == 1)
    for (; r + 8 <= rows; r += 8) tile<8, 1>(w + r * columns, columns, x, x_stride, out + r, out_stride);
  for (; r + 4 <= rows; r += 4)
    tokens_of_tile<4>(w + r * columns, columns, x, x_stride, tokens, out + r, out_stride);
  for (; r < rows; r++)  // as a tile whose other rows are this one again
    for (int64_t t = 0; t < tokens; t++) {
      Vec acc = {};
      int64_t k = 0;
      auto add = [&](Vec wk) { acc = add_product<X>(acc, wk, operands<X>(x + t * x_stride + k)); };
      for (; k + STEP<X> <= columns; k += STEP<X>) add(operands<X>(w + r * columns + k));
      if (k < columns) add(some_operands<X>(w + r * columns + k, columns - k));
      float sums[4];
      sum4(acc, acc, acc, acc, sums);
      out[t * out_stride + r] = sums[0];
    }
}

// A row of float32 that widen wrote becomes one of bfloat16, in place, padded with zeros to whole vectors.
inline void pair_up(float* row, int64_t columns) {
  for (int64_t k = 0; k < columns; k += 2 * LANES) {
    Vec first = load(row + k), second = k + LANES < columns ? load(row + k + LANES) : Vec{};
    store((bf16*)row + k, first);
    store((bf16*)row + k + LANES, second);
  }
}

// Rows of a weight for a task: as many as stay in a core's own cache while several tokens use them.
inline int64_t rows_of_task(int64_t row_bytes) {
  int64_t rows = (128 << 10) / row_bytes / 8 * 8;
  return rows < 8 ? 8 : rows > 64 ? 64 : rows;
}

// Rows of x as float32, padded; through RMSNorm if there is a weight, and then rounded to T as the result of a norm is.
template <class T, class N>
inline void widen(
    const T* x, int64_t x_stride, const N* norm, float eps, int64_t tokens, int64_t columns, float* out) {
  int64_t stride = padded(columns);
  for (int64_t t = 0; t < tokens; t++) {
    const T* row = x + t * x_stride;
    float* to = out + t * stride;
    float scale = 1.f;
    if (norm) {
      Vec squares = {};
      in_lanes(columns, [&](int64_t k, int64_t n) {
        Vec v = load(row + k, n);
        squares += v * v;
      });
      scale = 1.f / std::sqrt(sum(squares) / columns + eps);
    }
    in_lanes(columns, [&](int64_t k, int64_t n) {
      Vec v = load(row + k, n);
      if (norm) v = rounded<T>(v * scale * load(norm + k, n));
      store(to + k, v);  // the whole vector: what is past the end is zero
    });
  }
}

}  // namespace thalweg
