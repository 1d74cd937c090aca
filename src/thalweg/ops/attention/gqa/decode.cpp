// Op "gqa_mixer_decode": gated attention of grouped heads for one new token of each sequence. A task is a key head of a
// sequence with the query heads that share it.
#include "attend.h"
#include "recording.h"

using namespace thalweg;

namespace {

struct Shape {
  int64_t B, H, G, K, pairs, S;  // pairs that are rotated; tokens in a block
};

template <class T, class N>
void gqa(
    const T* proj,
    int64_t proj_stride,
    const N* q_norm,
    const N* k_norm,
    float eps,
    const float* frequencies,
    float rope_scale,
    const int64_t* positions,
    T* keys,
    T* values,
    const int64_t* block_rows,
    const int32_t* tables,
    int64_t table_stride,
    const int32_t* lengths,
    T* out,
    const Shape& s,
    int threads) {
  const int64_t width = padded(s.K), ratio = s.H / s.G, row = s.G * s.K;
  int64_t tokens = 0;
  for (int64_t b = 0; b < s.B; b++) tokens += lengths[b];
  parallel_for(worth(threads, 2 * tokens * row * (int64_t)sizeof(T)), s.B * s.G, [&](int64_t task) {
    const int64_t b = task / s.G, g = task % s.G;
    float* q = scratch<1>((2 * ratio + 2 * TILE) * width + 2 * s.pairs);
    float *sums = q + ratio * width, *key_tile = sums + ratio * width, *value_tile = key_tile + TILE * width;
    float *cosines = value_tile + TILE * width, *sines = cosines + s.pairs;
    turns(positions[b], frequencies, s.pairs, rope_scale, cosines, sines);
    const T* x = proj + b * proj_stride;
    const T* k = x + 2 * s.H * s.K + g * s.K;
    norm_and_turn(k, k_norm, eps, cosines, sines, s.K, s.pairs, key_tile);
    in_lanes(s.K, [&](int64_t i, int64_t n) { store(keys + block_rows[b] * row + g * s.K + i, load(key_tile + i), n); });
    memcpy(values + block_rows[b] * row + g * s.K, k + row, s.K * sizeof(T));
    for (int64_t h = 0; h < ratio; h++) {
      norm_and_turn(x + 2 * (g * ratio + h) * s.K, q_norm, eps, cosines, sines, s.K, s.pairs, q + h * width);
      for (int64_t i = 0; i < width; i += LANES)
        store(q + h * width + i, load(q + h * width + i) * (1.f / std::sqrt((float)s.K)));
    }
    auto fill = [&](int64_t first, int64_t count) {
      for (int64_t t = 0; t < count; t++) {
        int64_t at = first + t, where = (tables[b * table_stride + at / s.S] * s.S + at % s.S) * row + g * s.K;
        widen(keys + where, 0, (const T*)nullptr, 0.f, 1, s.K, key_tile + t * width);
        widen(values + where, 0, (const T*)nullptr, 0.f, 1, s.K, value_tile + t * width);
      }
    };
    attend(q, ratio, width, key_tile, value_tile, width, width, lengths[b], fill, sums);
    for (int64_t h = 0; h < ratio; h++) {
      const int64_t head = g * ratio + h;
      const T* gate = x + (2 * head + 1) * s.K;
      in_lanes(s.K, [&](int64_t i, int64_t n) {
        Vec o = rounded<T>(load(sums + h * width + i)) * sigmoid(load(gate + i, n));
        store(out + (b * s.H + head) * s.K + i, o, n);
      });
    }
  });
}

}  // namespace

extern "C" void thalweg_gqa_mixer(
    int dtype,
    const void* proj,
    int64_t proj_stride,
    int norm_dtype,
    const void* q_norm,
    const void* k_norm,
    float eps,
    const float* frequencies,
    float rope_scale,
    const int64_t* positions,
    void* keys,
    void* values,
    const int64_t* block_rows,
    const int32_t* tables,
    int64_t table_stride,
    const int32_t* lengths,
    void* out,
    int64_t B,
    int64_t H,
    int64_t G,
    int64_t K,
    int64_t pairs,
    int64_t S,
    int threads) {
  Shape s{B, H, G, K, pairs, S};
  auto run = [&](auto t, auto n) {
    using T = decltype(t);
    using N = decltype(n);
    gqa<T, N>(
        (const T*)proj, proj_stride, (const N*)q_norm, (const N*)k_norm, eps, frequencies, rope_scale, positions,
        (T*)keys, (T*)values, block_rows, tables, table_stride, lengths, (T*)out, s, threads);
  };
  if (dtype == FLOAT32)
    run(float{}, float{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

THALWEG_RECORDABLE(gqa_mixer)
