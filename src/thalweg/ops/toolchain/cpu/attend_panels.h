// Attention of prompts: queries in the lanes, a tile of keys after the other with running sums. A softmax runs over rows
// and needs no sums over lanes. Tiles begin at the same tokens whatever the queries, so neither the number of threads
// nor the company that a query has changes a bit.
#pragma once

#include <limits>

#include "panels.h"

namespace thalweg {

constexpr int64_t KEYS = PANEL;  // of a tile

// What a panel of queries has summed up: values [V, PANEL], and per query the largest score and the sum of weights.
struct Running {
  float *values, *most, *total;

  static int64_t size(int64_t V) { return (V + 2) * PANEL; }

  static Running at(float* room, int64_t V) { return {room, room + V * PANEL, room + (V + 1) * PANEL}; }

  void begin(int64_t V) const {
    memset(values, 0, 4 * V * PANEL);
    for (int64_t t = 0; t < PANEL; t++) most[t] = -std::numeric_limits<float>::infinity(), total[t] = 0;
  }
};

// Moves on by `count` keys from `first`, whose scores [count, PANEL] are overwritten. Query t sees the keys up to
// last[t], those of the first tile at least; row r of `values` is value channel r, a word per key.
inline void attend_tile(
    float* scores, int64_t first, int64_t count, const int32_t* last, int vectors, Rows values, int64_t V, Running sums) {
  for (int64_t t = 0; t < vectors * LANES; t += LANES) {
    IVec sees;
    memcpy(&sees, last + t, sizeof sees);
    Vec most = load(sums.most + t), top = most;
    for (int64_t k = 0; k < count; k++) {
      Vec s = load(scores + k * PANEL + t);
      s = sees < (int32_t)(first + k) ? splat(-std::numeric_limits<float>::infinity()) : s;
      store(scores + k * PANEL + t, s);
      top = larger(s, top);
    }
    Vec keep = exp(most - top), total = load(sums.total + t) * keep;
    for (int64_t k = 0; k < count; k++) {
      Vec p = exp(load(scores + k * PANEL + t) - top);
      total += p;
      store(scores + k * PANEL + t, p);
    }
    store(sums.most + t, top);
    store(sums.total + t, total);
    for (int64_t v = 0; v < V; v++) store(sums.values + v * PANEL + t, load(sums.values + v * PANEL + t) * keep);
  }
  panel_product<false>(values, V, count, scores, vectors, sums.values, true);
}

// The values of `tokens` queries: take(t, v, n, values) gets n channels from v on of query t.
template <class Take>
inline void finish(Running sums, int64_t V, int64_t tokens, Take&& take) {
  for (int64_t t = 0; t < vectors_of(tokens) * LANES; t += LANES) {
    Vec inverse = 1.f / load(sums.total + t);
    for (int64_t v = 0; v < V; v++) store(sums.values + v * PANEL + t, load(sums.values + v * PANEL + t) * inverse);
  }
  unpack(sums.values, V, tokens, take);
}

}  // namespace thalweg
