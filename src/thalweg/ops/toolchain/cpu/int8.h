// Weights in GGML's blocks times activations that are rounded to 8 bits: sums within a block are of integers and exact.
//
// An activation row is rounded as llama.cpp rounds it: in blocks of 32 for types whose blocks have 32 elements, in
// blocks of 256 for the K types. It takes the place of the row in float32, which is larger than both together.
#pragma once

#include "blocks.h"

namespace thalweg {

// A row in blocks of 32: quants of all blocks, then d of each, then the sum of quants of each.
struct Rounded32 {
  const uint8_t* at;
  int64_t columns;

  const int8_t* q() const { return (const int8_t*)at; }
  const float* d() const { return (const float*)(at + columns); }  // an element is d * q
  const int32_t* sums() const { return (const int32_t*)(at + columns + columns / 8); }
  static int64_t bytes(int64_t columns) { return (columns + columns / 4 + 63) / 64 * 64; }
};

struct Rounded256 {
  int8_t q[256];
  int16_t sums[16];  // of 16 q each
  float part[16];    // d times the sums of 32 q each, and zeros
  float d;
  float unused[7];
};

// A row is a Rounded32, then Rounded256 from Rounded32::bytes on; either only if a type asks for it.
struct RoundedMatrix : BlockMatrix {
  RoundedMatrix from(int64_t expert, int64_t rows) const { return {BlockMatrix::from(expert, rows)}; }

  // A row of `columns` floats becomes the rounded row that `times` takes for it.
  void round(float* row) const;

  // As rows_times; x points to rounded rows.
  void times(
      int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride)
      const;
};

}  // namespace thalweg
