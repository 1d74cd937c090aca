// Weights in GGML's blocks times activations that are rounded to 8 bits: sums within a block are of integers and exact.
//
// An activation row is rounded as llama.cpp rounds it: in blocks of 32 for types whose blocks have 32 elements, in
// blocks of 256 for the K types. It takes the place of the row in float32, which is larger than both together.
#pragma once

#include "blocks.h"

namespace thalweg {

struct Rounded32 {
  int8_t q[32];
  float d;      // an element is d * q
  int32_t sum;  // of q
};

struct Rounded256 {
  int8_t q[256];
  int16_t sums[16];  // of 16 q each
  float part[16];    // d times the sums of 32 q each, and zeros
  float d;
  float unused[7];
};

// A row of D columns: those of 32, then those of 256 from the next line on; either only if a type asks for it.
inline int64_t bytes_of_32(int64_t columns) { return (columns / 32 * (int64_t)sizeof(Rounded32) + 63) / 64 * 64; }

struct RoundedMatrix : BlockMatrix {
  static constexpr bool ROUNDS = true;

  RoundedMatrix from(int64_t expert, int64_t rows) const { return {BlockMatrix::from(expert, rows)}; }

  // A row of `columns` floats becomes the rounded row that `times` takes for it.
  void round(float* row) const;

  // As rows_times; x points to rounded rows.
  void times(
      int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride)
      const;
};

}  // namespace thalweg
