// Op "mla_prefill": keys and values are made of the latents some heads and PASS tokens at a time, and every panel of
// queries goes over them with running sums.
#include "attend_panels.h"

using namespace thalweg;

namespace {

constexpr int64_t PASS = 16 * KEYS;  // tokens whose keys and values are there at a time

struct Shape {
  int64_t H, K, V, R, P, S;  // S: tokens in a block
};

// Latents of a sequence's tokens.
template <class T>
struct Latents {
  const T* blocks;
  const int32_t* table;
  int64_t S, C;

  const T* operator[](int64_t token) const { return blocks + (table[token / S] * S + token % S) * C; }
};

template <class T>
void attend_sequence(
    const T* q,
    int64_t q_token,
    int64_t q_head,
    const Latents<T>& latents,
    int64_t cached,
    int64_t tokens,
    const T* up,
    float scale,
    T* out,
    const Shape& s,
    int threads) {
  const int64_t total = cached + tokens, X = s.K + s.P, words = words_of<T>(s.R), up_rows = s.K + s.V;
  const int64_t queries = panels_of(tokens), group = s.H < threads ? s.H : threads;
  const int64_t passes = (total + PASS - 1) / PASS, most_tiles = panels_of(total < PASS ? total : PASS);
  threads = worth_products(threads, s.H * total * (tokens * (X + s.V) / 2 + s.R * up_rows));
  float* low = scratch<8>(most_tiles * (words + s.P) * PANEL);  // latents to be projected up, and shared keys
  float* kv = scratch<9>(group * most_tiles * up_rows * PANEL);
  float* sums = scratch<10>(group * queries * Running::size(s.V));
  for (int64_t head = 0; head < s.H; head += group) {
    const int64_t heads = s.H - head < group ? s.H - head : group;
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t begin = pass * PASS, end = total - begin < PASS ? total : begin + PASS, tiles = panels_of(end - begin);
      auto keys_in = [&](int64_t tile) { return end - begin - tile * KEYS < KEYS ? end - begin - tile * KEYS : KEYS; };
      if (head == 0 || passes > 1)
        parallel_for(threads, tiles, [&](int64_t tile) {
          const int64_t first = begin + tile * KEYS;
          float* to = low + tile * (words + s.P) * PANEL;
          pack<T>(keys_in(tile), [&](int64_t t) { return latents[first + t]; }, (const T*)nullptr, 0.f, s.R, to);
          pack_words(keys_in(tile), s.P, to + words * PANEL, [&](int64_t t, float* shared) {
            widen(latents[first + t] + s.R, 0, (const T*)nullptr, 0.f, 1, s.P, shared);
          });
        });
      parallel_for(threads, heads * tiles, [&](int64_t task) {
        const int64_t h = task / tiles, tile = task % tiles;
        float* room = scratch<1>(up_rows * words);
        const Rows rows = rows_for<T>(PlainMatrix<T>{up, s.R}, (head + h) * up_rows, up_rows, room);
        panel_product<PAIRS<T>>(
            rows, up_rows, words, low + tile * (words + s.P) * PANEL, vectors_of(keys_in(tile)),
            kv + (h * most_tiles + tile) * up_rows * PANEL, false);
      });
      parallel_for(threads, heads * queries, [&](int64_t task) {
        // The last queries see the most: they are begun first.
        const int64_t h = task % heads, panel = queries - 1 - task / heads, first = panel * PANEL;
        const int64_t count = tokens - first < PANEL ? tokens - first : PANEL, furthest = cached + first + count - 1;
        const Running of_panel = Running::at(sums + (h * queries + panel) * Running::size(s.V), s.V);
        if (pass == 0) of_panel.begin(s.V);
        if (furthest >= begin) {
          float *panel_q = scratch<1>((X + KEYS) * PANEL), *scores = panel_q + X * PANEL;
          pack_words(count, X, panel_q, [&](int64_t t, float* row) {
            widen(q + (first + t) * q_token + (head + h) * q_head, 0, (const T*)nullptr, 0.f, 1, X, row);
            for (int64_t i = 0; i < padded(X); i += LANES) store(row + i, load(row + i) * scale);
          });
          int32_t last[PANEL];
          for (int64_t t = 0; t < PANEL; t++) last[t] = (int32_t)(cached + first + (t < count ? t : count - 1));
          for (int64_t tile = 0; tile < tiles && begin + tile * KEYS <= furthest; tile++) {
            const int64_t key = begin + tile * KEYS, seen = furthest + 1 - key, keys = keys_in(tile) < seen ? keys_in(tile) : seen;
            const float* of_tile = kv + (h * most_tiles + tile) * up_rows * PANEL;
            const float* shared = low + (tile * (words + s.P) + words) * PANEL;
            panel_product<false>(Rows{of_tile, 1, PANEL}, keys, s.K, panel_q, vectors_of(count), scores, false);
            if (s.P)
              panel_product<false>(
                  Rows{shared, 1, PANEL}, keys, s.P, panel_q + s.K * PANEL, vectors_of(count), scores, s.K > 0);
            attend_tile(
                scores, key, keys, last, vectors_of(count), Rows{of_tile + s.K * PANEL, PANEL}, s.V, of_panel);
          }
        }
        if (pass == passes - 1)
          finish(of_panel, s.V, count, [&](int64_t t, int64_t v, int64_t n, Vec values) {
            store(out + ((first + t) * s.H + head + h) * s.V + v, values, n);
          });
      });
    }
  }
}

}  // namespace

extern "C" void thalweg_mla_prefill(
    int dtype,
    const void* q,
    int64_t q_token,
    int64_t q_head,
    const void* blocks,
    const int32_t* tables,
    int64_t table_stride,
    const int64_t* cached,
    const int64_t* offsets,
    const void* up,
    float scale,
    void* out,
    int64_t B,
    int64_t H,
    int64_t K,
    int64_t V,
    int64_t R,
    int64_t P,
    int64_t S,
    int threads) {
  const Shape s{H, K, V, R, P, S};
  auto run = [&](auto element) {
    using T = decltype(element);
    for (int64_t b = 0; b < B; b++) {
      const int64_t first = offsets[b], tokens = offsets[b + 1] - first;
      const Latents<T> latents{(const T*)blocks, tables + b * table_stride, S, R + P};
      if (tokens)
        attend_sequence(
            (const T*)q + first * q_token, q_token, q_head, latents, cached[b], tokens, (const T*)up, scale,
            (T*)out + first * H * V, s, threads);
    }
  };
  dtype == FLOAT32 ? run(float{}) : run(bf16{});
}
