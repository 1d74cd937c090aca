// Weights whose rows are GGML's blocks, each segment of rows in a type of its own, and plain ones behind the same name.
#pragma once

#include "rows.h"

namespace thalweg {

// Rows of T one after the other.
template <class T>
struct PlainMatrix {
  const T* base;
  int64_t columns;

  int64_t row_bytes() const { return columns * sizeof(T); }

  PlainMatrix from(int64_t expert, int64_t rows) const { return {base + expert * rows * columns, columns}; }

  // What becomes of a row of activations, which are values of T, before `times` takes it.
  void round(float* x) const {
    if constexpr (PAIRS<T>) pair_up(x, columns);
  }

  // As rows_times, of `count` rows from `first`.
  void times(
      int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride)
      const {
    const T* w = base + first * columns;
    if constexpr (PAIRS<T>)
      rows_times(w, count, columns, (const T*)x, 2 * x_stride, tokens, out, out_stride);
    else
      rows_times(w, count, columns, x, x_stride, tokens, out, out_stride);
  }
};

// Bytes of a row in a type, of a number that Python has looked up among those of ops/linear/blocks_cpp.py.
int64_t bytes_of_row(int32_t type, int64_t columns);

struct BlockMatrix {
  const uint8_t* base;
  int64_t columns;
  int segments;
  const int32_t* types;  // of each segment, as GGML numbers them
  const int64_t* rows;   // of each segment

  int64_t bytes() const;                   // of all rows
  int64_t row_bytes() const;               // of one, on average
  BlockMatrix from(int64_t expert, int64_t) const {
    BlockMatrix moved = *this;
    moved.base += expert * bytes();
    return moved;
  }
  void times(
      int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride)
      const;

  // Rows as float32, one after the other.
  void widen(int64_t first, int64_t count, float* out) const;

  // f(type, its rows in memory, how many, which of `count` is the first) for the parts of those rows in one type each.
  template <class F>
  void in_segments(int64_t first, int64_t count, F&& f) const {
    const uint8_t* at = base;
    for (int64_t i = 0, done = 0; i < segments && done < count; i++) {
      int64_t row = bytes_of_row(types[i], columns), here = rows[i] - first < count - done ? rows[i] - first : count - done;
      if (here > 0) f(types[i], at + first * row, here, done), done += here;
      first = here > 0 ? 0 : first - rows[i];
      at += rows[i] * row;
    }
  }
};

}  // namespace thalweg
