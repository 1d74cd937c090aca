// What a kind of weight makes of panels of activations, for ops of many tokens: a plain one multiplies them as they
// are, GGML's blocks are widened to float32 or multiplied with rounded activations.
#pragma once

#include "int8_panels.h"
#include "panels.h"

namespace thalweg {

// Of activations in T:
// PAIR: whether words are pairs of bfloat16; floats otherwise.
// words(): of a token in a panel. room(): words that rows() needs for each row.
// pack(): as the function `pack`. round(): makes of a panel of floats, `columns` words, what product() takes.
// rows(): `count` rows of the weight from `first`, for product(), which is as panel_product.
template <class T, class W>
struct Products;

template <class T>
struct Products<T, PlainMatrix<T>> {
  static constexpr bool PAIR = PAIRS<T>;
  const PlainMatrix<T>& w;

  int64_t words() const { return words_of<T>(w.columns); }
  int64_t room() const { return words(); }
  template <class N, class Row>
  void pack(int64_t tokens, Row&& row, const N* norm, float eps, float* panel) const {
    thalweg::pack<T>(tokens, row, norm, eps, w.columns, panel);
  }
  void round(float*, int) const {}
  Rows rows(int64_t first, int64_t count, float* room) const { return rows_for<T>(w, first, count, room); }
  void product(Rows rows, int64_t count, const float* x, int vectors, float* out) const {
    panel_product<PAIR>(rows, count, words(), x, vectors, out, false);
  }
};

template <class T, class N, class Row>
inline void pack_floats(int64_t tokens, Row&& row, const N* norm, float eps, int64_t columns, float* panel) {
  pack_words(tokens, columns, panel, [&](int64_t t, float* to) { widen(row(t), 0, norm, eps, 1, columns, to); });
}

template <class T>
struct Products<T, BlockMatrix> {
  static constexpr bool PAIR = false;
  const BlockMatrix& w;

  int64_t words() const { return w.columns; }
  int64_t room() const { return w.columns; }
  template <class N, class Row>
  void pack(int64_t tokens, Row&& row, const N* norm, float eps, float* panel) const {
    pack_floats<T>(tokens, row, norm, eps, w.columns, panel);
  }
  void round(float*, int) const {}
  Rows rows(int64_t first, int64_t count, float* room) const {
    w.widen(first, count, room);
    return {room, w.columns};
  }
  void product(Rows rows, int64_t count, const float* x, int vectors, float* out) const {
    panel_product<false>(rows, count, w.columns, x, vectors, out, false);
  }
};

template <class T>
struct Products<T, RoundedMatrix> {
  static constexpr bool PAIR = false;
  const RoundedMatrix& w;

  int64_t words() const { return rounded_words(w); }
  int64_t room() const { return unpacked_words(w.columns); }
  template <class N, class Row>
  void pack(int64_t tokens, Row&& row, const N* norm, float eps, float* panel) const {
    float* floats = scratch<8>(w.columns * PANEL);
    pack_floats<T>(tokens, row, norm, eps, w.columns, floats);
    round_panel(w, floats, vectors_of(tokens), panel);
  }
  void round(float* panel, int vectors) const {
    float* floats = scratch<8>(w.columns * PANEL);
    memcpy(floats, panel, 4 * w.columns * PANEL);
    round_panel(w, floats, vectors, panel);
  }
  UnpackedRows rows(int64_t first, int64_t count, float* room) const {
    unpack_rows(w, first, count, room);
    return {first, room};
  }
  void product(UnpackedRows rows, int64_t count, const float* x, int vectors, float* out) const {
    rounded_product(w, rows, count, x, vectors, out);
  }
};

}  // namespace thalweg
