// Attention of a few queries over a sequence's tokens, a tile after the other with running sums: a softmax needs no
// second pass. The tiles are fixed, so neither the number of threads nor other sequences change a bit.
#pragma once

#include <limits>
#include <type_traits>

#include "rows.h"

namespace thalweg {

constexpr int64_t TILE = 16;  // tokens

// sums[n] = keep[n] sums[n] + p[n] . values for N heads and M vectors of values, of a tile's tokens in order.
template <int N, int M>
inline void add_values(
    const float* p,
    const float* keep,
    const float* values,
    int64_t value_stride,
    int64_t count,
    float* sums,
    int64_t sums_stride) {
  Vec acc[N][M];
#pragma GCC unroll 4
  for (int n = 0; n < N; n++)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) acc[n][m] = load(sums + n * sums_stride + m * LANES) * keep[n];
  for (int64_t t = 0; t < count; t++) {
    Vec v[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) v[m] = load(values + t * value_stride + m * LANES);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) acc[n][m] += v[m] * p[n * TILE + t];
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; n++)
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) store(sums + n * sums_stride + m * LANES, acc[n][m]);
}

// sums[h] = softmax(q[h] . keys) values over `length` tokens, zeros if there are none. fill(first, count) puts tokens
// first .. first + count into `keys` and `values`, which may be the same tile. Widths are whole vectors; q is scaled.
template <class Fill>
inline void attend(
    const float* q,
    int64_t heads,
    int64_t key_width,
    const float* keys,
    const float* values,
    int64_t value_stride,
    int64_t value_width,
    int64_t length,
    Fill&& fill,
    float* sums) {
  float* scores = scratch<3>(heads * (TILE + 3));
  float *most = scores + heads * TILE, *total = most + heads, *kept = total + heads;
  memset(sums, 0, 4 * heads * value_width);
  for (int64_t h = 0; h < heads; h++) most[h] = -std::numeric_limits<float>::infinity(), total[h] = 0;
  for (int64_t first = 0; first < length; first += TILE) {
    int64_t count = length - first < TILE ? length - first : TILE;
    fill(first, count);
    rows_times(keys, count, key_width, q, key_width, heads, scores, TILE);
    for (int64_t h = 0; h < heads; h++) {
      float *p = scores + h * TILE, top = most[h];
      for (int64_t t = 0; t < count; t++) top = p[t] > top ? p[t] : top;
      float keep = std::exp(most[h] - top);
      most[h] = top;
      for (int64_t t = count; t < TILE; t++) p[t] = -std::numeric_limits<float>::infinity();
      for (int64_t t = 0; t < TILE; t += LANES) store(p + t, exp(load(p + t) - top));
      total[h] *= keep;
      for (int64_t t = 0; t < count; t++) total[h] += p[t];
      kept[h] = keep;
    }
    auto add = [&](auto heads_at_once, int64_t h) {
      constexpr int N = heads_at_once();
      int64_t i = 0;
      for (; i + 2 * LANES <= value_width; i += 2 * LANES)
        add_values<N, 2>(scores + h * TILE, kept + h, values + i, value_stride, count, sums + h * value_width + i, value_width);
      if (i < value_width)
        add_values<N, 1>(scores + h * TILE, kept + h, values + i, value_stride, count, sums + h * value_width + i, value_width);
    };
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) add(std::integral_constant<int, 4>{}, h);
    for (; h < heads; h++) add(std::integral_constant<int, 1>{}, h);
  }
  for (int64_t h = 0; h < heads; h++) {
    float inverse = length > 0 ? 1.f / total[h] : 0.f;
    for (int64_t i = 0; i < value_width; i += LANES)
      store(sums + h * value_width + i, load(sums + h * value_width + i) * inverse);
  }
}

// Cosines and sines of `pairs` angles at a position, times `scale`.
inline void turns(int64_t position, const float* frequencies, int64_t pairs, float scale, float* cosines, float* sines) {
  for (int64_t i = 0; i < pairs; i++) {
    float angle = (float)position * frequencies[i];
    cosines[i] = std::cos(angle) * scale;
    sines[i] = std::sin(angle) * scale;
  }
}

// A head's K values through their norm, the first 2 * pairs turned, rounded to T as float32.
template <class T, class N>
inline void norm_and_turn(
    const T* x, const N* weight, float eps, const float* cosines, const float* sines, int64_t K, int64_t pairs, float* out) {
  Vec squares = {};
  in_lanes(K, [&](int64_t k, int64_t n) {
    Vec v = load(x + k, n);
    squares += v * v;
  });
  float scale = 1.f / std::sqrt(sum(squares) / K + eps);
  in_lanes(K, [&](int64_t k, int64_t n) { store(out + k, load(x + k, n) * scale * load(weight + k, n)); });
  for (int64_t i = 0; i < pairs; i++) {
    float first = out[i], second = out[pairs + i];
    out[i] = first * cosines[i] - second * sines[i];
    out[pairs + i] = second * cosines[i] + first * sines[i];
  }
  for (int64_t k = 0; k < K; k += LANES) store(out + k, rounded<T>(load(out + k)));
}

}  // namespace thalweg
