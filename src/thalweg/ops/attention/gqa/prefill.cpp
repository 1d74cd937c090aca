// Ops "gqa_prepare" and "gqa_prefill": gated attention of grouped heads over prompts. The queries of the heads that
// share a key head lie in one panel; keys and values are widened PASS tokens at a time.
#include "attend.h"
#include "attend_panels.h"

using namespace thalweg;

namespace {

constexpr int64_t PASS = 16 * KEYS;

struct Shape {
  int64_t H, G, K, S;  // S: tokens in a block
};

template <class T>
void attend_sequence(
    const T* q,
    const T* proj,
    int64_t proj_stride,
    const T* keys,
    const T* values,
    const int32_t* table,
    int64_t cached,
    int64_t tokens,
    T* out,
    const Shape& s,
    int threads) {
  const int64_t total = cached + tokens, ratio = s.H / s.G, row = s.G * s.K, width = padded(s.K);
  const int64_t queries = tokens * ratio, panels = panels_of(queries), passes = (total + PASS - 1) / PASS;
  const int64_t most = total < PASS ? total : PASS;
  const float scale = 1.f / std::sqrt((float)s.K);
  threads = worth_products(threads, s.H * total * tokens * s.K);
  float* kv = scratch<8>(s.G * most * 2 * width);  // of a key head: keys, then values
  float* sums = scratch<9>(s.G * panels * Running::size(s.K));
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t begin = pass * PASS, here = total - begin < PASS ? total - begin : PASS;
    parallel_for(threads, panels_of(here), [&](int64_t tile) {
      for (int64_t t = tile * KEYS; t < here && t < (tile + 1) * KEYS; t++)
        for (int64_t g = 0; g < s.G; g++) {
          const int64_t token = begin + t, at = (table[token / s.S] * s.S + token % s.S) * row + g * s.K;
          widen(keys + at, 0, (const T*)nullptr, 0.f, 1, s.K, kv + (2 * g * most + t) * width);
          widen(values + at, 0, (const T*)nullptr, 0.f, 1, s.K, kv + ((2 * g + 1) * most + t) * width);
        }
    });
    parallel_for(threads, s.G * panels, [&](int64_t task) {
      // The last queries see the most: they are begun first.
      const int64_t g = task % s.G, panel = panels - 1 - task / s.G, first = panel * PANEL;
      const int64_t count = queries - first < PANEL ? queries - first : PANEL;
      auto token = [&](int64_t i) { return (first + i) / ratio; };
      auto head = [&](int64_t i) { return g * ratio + (first + i) % ratio; };
      const int64_t furthest = cached + token(count - 1);
      const Running of_panel = Running::at(sums + (g * panels + panel) * Running::size(s.K), s.K);
      if (pass == 0) of_panel.begin(s.K);
      if (furthest >= begin) {
        float *panel_q = scratch<1>((s.K + KEYS) * PANEL), *scores = panel_q + s.K * PANEL;
        pack_words(count, s.K, panel_q, [&](int64_t i, float* to) {
          widen(q + (token(i) * s.H + head(i)) * s.K, 0, (const T*)nullptr, 0.f, 1, s.K, to);
          for (int64_t k = 0; k < width; k += LANES) store(to + k, load(to + k) * scale);
        });
        int32_t last[PANEL];
        for (int64_t i = 0; i < PANEL; i++) last[i] = (int32_t)(cached + token(i < count ? i : count - 1));
        for (int64_t t = 0; t < here && begin + t <= furthest; t += KEYS) {
          const int64_t seen = furthest + 1 - begin < here ? furthest + 1 - begin : here;
          const int64_t some = seen - t < KEYS ? seen - t : KEYS;
          const float *of_keys = kv + (2 * g * most + t) * width, *of_values = of_keys + most * width;
          panel_product<false>(Rows{of_keys, width}, some, s.K, panel_q, vectors_of(count), scores, false);
          attend_tile(scores, begin + t, some, last, vectors_of(count), Rows{of_values, 1, width}, s.K, of_panel);
        }
      }
      if (pass == passes - 1)
        finish(of_panel, s.K, count, [&](int64_t i, int64_t k, int64_t n, Vec v) {
          Vec gate = load(proj + token(i) * proj_stride + (2 * head(i) + 1) * s.K + k, n);
          store(out + (token(i) * s.H + head(i)) * s.K + k, rounded<T>(v) * sigmoid(gate), n);
        });
    });
  }
}

}  // namespace

extern "C" void thalweg_gqa_prepare(
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
    void* q,
    int64_t tokens,
    int64_t H,
    int64_t G,
    int64_t K,
    int64_t pairs,
    int threads) {
  auto run = [&](auto t, auto n) {
    using T = decltype(t);
    using N = decltype(n);
    constexpr int64_t CHUNK = 16;  // tokens of a task
    parallel_for(worth(threads, 8 * tokens * (H + G) * K), (tokens + CHUNK - 1) / CHUNK, [&](int64_t task) {
      float* row = scratch<1>(padded(K) + 2 * pairs);
      float *cosines = row + padded(K), *sines = cosines + pairs;
      for (int64_t t = task * CHUNK; t < tokens && t < (task + 1) * CHUNK; t++) {
        const T* x = (const T*)proj + t * proj_stride;
        turns(positions[t], frequencies, pairs, rope_scale, cosines, sines);
        auto put_head = [&](const T* from, const N* norm, T* to) {
          norm_and_turn(from, norm, eps, cosines, sines, K, pairs, row);
          in_lanes(K, [&](int64_t i, int64_t some) { store(to + i, load(row + i), some); });
        };
        for (int64_t h = 0; h < H; h++) put_head(x + 2 * h * K, (const N*)q_norm, (T*)q + (t * H + h) * K);
        for (int64_t g = 0; g < G; g++)
          put_head(x + (2 * H + g) * K, (const N*)k_norm, (T*)keys + (block_rows[t] * G + g) * K);
        memcpy((T*)values + block_rows[t] * G * K, x + (2 * H + G) * K, G * K * sizeof(T));
      }
    });
  };
  if (dtype == FLOAT32)
    run(float{}, float{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

extern "C" void thalweg_gqa_prefill(
    int dtype,
    const void* q,
    const void* proj,
    int64_t proj_stride,
    const void* keys,
    const void* values,
    const int32_t* tables,
    int64_t table_stride,
    const int64_t* cached,
    const int64_t* offsets,
    void* out,
    int64_t B,
    int64_t H,
    int64_t G,
    int64_t K,
    int64_t S,
    int threads) {
  const Shape s{H, G, K, S};
  auto run = [&](auto element) {
    using T = decltype(element);
    for (int64_t b = 0; b < B; b++) {
      const int64_t first = offsets[b], tokens = offsets[b + 1] - first;
      if (tokens)
        attend_sequence(
            (const T*)q + first * H * K, (const T*)proj + first * proj_stride, proj_stride, (const T*)keys,
            (const T*)values, tables + b * table_stride, cached[b], tokens, (T*)out + first * H * K, s, threads);
    }
  };
  dtype == FLOAT32 ? run(float{}) : run(bf16{});
}
