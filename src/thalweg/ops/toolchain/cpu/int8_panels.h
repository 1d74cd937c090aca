// Panels of activations rounded to 8 bits, and their products with GGML's blocks: as panels.h, for many tokens.
//
// Where the processor adds up four products of bytes in an instruction, a panel has four columns in a word and the
// scales of blocks behind them. Elsewhere it has the rounded values as floats, and weights are widened.
#pragma once

#include "int8.h"
#include "panels.h"

namespace thalweg {

int64_t rounded_words(const RoundedMatrix& w);

// A panel of floats, w.columns words, as one of rounded_words(w).
void round_panel(const RoundedMatrix& w, const float* floats, int vectors, float* out);

int64_t unpacked_words(int64_t columns);

// Rows from `first` of a weight as unpack_rows has left them.
struct UnpackedRows {
  int64_t first;
  const float* at;
};

// `count` rows from `first`, each unpacked_words long.
void unpack_rows(const RoundedMatrix& w, int64_t first, int64_t count, float* out);

// As panel_product.
void rounded_product(const RoundedMatrix& w, UnpackedRows rows, int64_t count, const float* x, int vectors, float* out);

}  // namespace thalweg
