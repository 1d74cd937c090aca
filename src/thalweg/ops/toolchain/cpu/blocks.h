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

  // As rows_times, of `count` rows from `first`.
  void times(
      int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride)
      const {
    rows_times(base + first * columns, count, columns, x, x_stride, tokens, out, out_stride);
  }
};

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
};

}  // namespace thalweg
