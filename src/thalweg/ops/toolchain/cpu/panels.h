// Products of many rows of activations with rows of a weight: tokens lie in the lanes.
//
// Activations are packed into panels, column after column with a panel's tokens side by side, and a weight's elements
// are spread over the lanes from where they lie. A token's sum runs over the columns from the first to the last, so it
// has the same bits whatever stands beside it and on any number of threads.
//
// Panels and rows consist of words of four bytes: an element in float32 or, for a processor that multiplies them,
// a pair of bfloat16 of neighbouring columns.
#pragma once

#include "blocks.h"
#include "tiles.h"

namespace thalweg {

constexpr int PANEL_VECTORS = 3;
constexpr int64_t PANEL = PANEL_VECTORS * LANES;  // tokens

// Words of a row of so many columns for activations in T.
template <class T>
constexpr int64_t words_of(int64_t columns) {
  return PAIRS<T> ? (columns + 1) / 2 : columns;
}

// Vectors of a panel with so many tokens, at most PANEL.
inline int vectors_of(int64_t tokens) { return (int)((tokens + LANES - 1) / LANES); }

inline int64_t panels_of(int64_t tokens) { return (tokens + PANEL - 1) / PANEL; }

// Rows of words: word k of row r at at[r * row + k * step].
struct Rows {
  const float* at;
  int64_t row, step = 1;

  Rows from(int64_t r) const { return {at + r * row, row, step}; }
};

// out[r * PANEL + t] = rows[r] . x[t] for the tokens of a panel, whose words k lie at x + k * PANEL; added to what is
// there if `add`. What lanes without a token get is of no matter.
template <bool PAIR>
void panel_product(Rows rows, int64_t count, int64_t words, const float* x, int vectors, float* out, bool add);

// to[c * to_stride + r] = from[r * from_stride + c], words of four bytes.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride);

// A row as words of T, through RMSNorm if there is a weight.
template <class T, class N>
inline void words_of_row(const T* x, const N* norm, float eps, int64_t columns, float* out) {
  if constexpr (PAIRS<T>) {
    if (!norm) {
      if (columns % 2) out[columns / 2] = 0;
      memcpy(out, x, columns * sizeof(T));
      return;
    }
    float* wide = scratch<6>(padded(columns));
    widen(x, 0, norm, eps, 1, columns, wide);
    if (columns % 2) out[columns / 2] = 0;
    in_lanes(columns, [&](int64_t k, int64_t n) { store((T*)out + k, load(wide + k), n); });
  } else {
    if (columns % LANES == 0) return widen(x, 0, norm, eps, 1, columns, out);
    float* wide = scratch<6>(padded(columns));
    widen(x, 0, norm, eps, 1, columns, wide);
    memcpy(out, wide, 4 * columns);
  }
}

// A panel of tokens, whose words fill(t, room) writes; lanes without a token repeat the last one.
template <class Fill>
inline void pack_words(int64_t tokens, int64_t words, float* panel, Fill&& fill) {
  float* some = scratch<7>(4 * padded(words));
  for (int64_t t = 0; t < vectors_of(tokens) * LANES; t += 4) {
    for (int64_t i = 0; i < 4; i++) fill(t + i < tokens ? t + i : tokens - 1, some + i * padded(words));
    transpose(some, padded(words), 4, words, panel + t, PANEL);
  }
}

// A panel of tokens, row(t) the activations of token t.
template <class T, class N, class Row>
inline void pack(int64_t tokens, Row&& row, const N* norm, float eps, int64_t columns, float* panel) {
  pack_words(tokens, words_of<T>(columns), panel, [&](int64_t t, float* words) {
    words_of_row(row(t), norm, eps, columns, words);
  });
}

// `count` rows of a weight from `first` as words for activations in T, as they lie or in `room`, count * words long.
template <class T>
inline Rows rows_for(const PlainMatrix<T>& w, int64_t first, int64_t count, float* room) {
  const T* at = w.base + first * w.columns;
  if constexpr (sizeof(T) == 4) {
    return {at, w.columns};
  } else {
    const int64_t words = words_of<T>(w.columns);
    if (PAIRS<T> && w.columns % 2 == 0) return {(const float*)at, words};
    for (int64_t r = 0; r < count; r++) words_of_row(at + r * w.columns, (const T*)nullptr, 0.f, w.columns, room + r * words);
    return {room, words};
  }
}

// A panel's results [rows, PANEL] token by token: take(t, i, n, values) gets n of the rows from i on of token t.
template <class Take>
inline void unpack(const float* panel, int64_t rows, int64_t tokens, Take&& take) {
  const int64_t stride = padded(rows);
  float* turned = scratch<7>(4 * stride);
  for (int64_t t = 0; t < tokens; t += 4) {
    transpose(panel + t, PANEL, rows, 4, turned, stride);
    for (int64_t i = 0; i < 4 && t + i < tokens; i++)
      in_lanes(rows, [&](int64_t r, int64_t n) { take(t + i, r, n, load(turned + i * stride + r)); });
  }
}

// Rows of a task of products: many for which the panels are read once more, and no more than stay in a core's cache.
inline int64_t rows_of_product(int64_t words) {
#if defined(THALWEG_TILES)
  constexpr int64_t TOGETHER = TILE_ROWS;
#else
  constexpr int64_t TOGETHER = 8;
#endif
  int64_t rows = (256 << 10) / (4 * words) / TOGETHER * TOGETHER;
  return rows < TOGETHER ? TOGETHER : rows > 64 ? 64 : rows;
}

// How many of `threads` are worth waking for so many products of numbers.
inline int worth_products(int threads, int64_t products) { return worth(threads, products / 4); }

}  // namespace thalweg
