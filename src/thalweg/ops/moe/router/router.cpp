// Op "norm_router": the norm, the scores of the experts and the choice among them.
#include <limits>

#include "panels.h"
#include "recording.h"

using namespace thalweg;

namespace {

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// The `count` largest of n values, best first, the lowest index of equals; a NaN counts as the least. Taken ones are
// marked: whatever the values are, the indices differ and are below n.
void best_of(const float* values, int64_t n, int64_t count, bool* taken, int64_t* out) {
  for (int64_t i = 0; i < n; i++) taken[i] = false;
  for (int64_t j = 0; j < count; j++) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
      if (!taken[i] && (best < 0 || values[i] > values[best] || (values[best] != values[best] && values[i] == values[i])))
        best = i;
    taken[best] = true;
    out[j] = best;
  }
}

struct Routing {
  int64_t E, top_k, groups, topk_groups, shared;
  bool softmax, renormalize, gated;
  float scale;
};

// Weights and ids of one token, of its logits, which become scores; behind them is the shared experts' gate, if any.
void route(const Routing& r, float* logits, const float* bias, float* weights, int64_t* ids) {
  const int64_t E = r.E, padded_E = padded(E);
  const float shared_weight = r.gated ? sigmoid(logits[E]) : 1.f;
  if (r.softmax) {
    float most = logits[0], total = 0;
    for (int64_t e = 1; e < E; e++) most = logits[e] > most ? logits[e] : most;
    for (int64_t e = 0; e < padded_E; e += LANES) store(logits + e, exp(load(logits + e) - most));
    for (int64_t e = 0; e < E; e++) total += logits[e];
    for (int64_t e = 0; e < E; e++) logits[e] /= total;
  } else {
    for (int64_t e = 0; e < padded_E; e += LANES) store(logits + e, sigmoid(load(logits + e)));
  }
  float* choice = scratch<2>(2 * E + 2 * r.groups + 2 * (E + r.groups));
  float *of_group = choice + E, *keep = of_group + r.groups;
  bool* taken = (bool*)(keep + r.groups);
  int64_t* kept = (int64_t*)scratch<3>(2 * (E + r.groups));
  for (int64_t e = 0; e < E; e++) choice[e] = logits[e] + bias[e];
  if (r.groups > 1) {
    int64_t size = E / r.groups;
    for (int64_t g = 0; g < r.groups; g++) {
      int64_t count = size < 2 ? size : 2;
      best_of(choice + g * size, size, count, taken, kept);
      of_group[g] = 0;
      for (int64_t i = 0; i < count; i++) of_group[g] += choice[g * size + kept[i]];
      keep[g] = 0;
    }
    best_of(of_group, r.groups, r.topk_groups, taken, kept);
    for (int64_t i = 0; i < r.topk_groups; i++) keep[kept[i]] = 1;
    for (int64_t e = 0; e < E; e++)
      if (!keep[e / size]) choice[e] = NEVER;
  }
  best_of(choice, E, r.top_k, taken, ids);
  float total = 0;
  for (int64_t j = 0; j < r.top_k; j++) total += weights[j] = logits[ids[j]];
  float divisor = r.renormalize ? total + 1e-20f : 1.f;
  for (int64_t j = 0; j < r.top_k; j++) weights[j] = weights[j] / divisor * r.scale;
  for (int64_t j = 0; j < r.shared; j++) {
    weights[r.top_k + j] = shared_weight;
    ids[r.top_k + j] = E + j;
  }
}

template <class T, class N>
void norm_router(
    const T* x,
    int64_t x_stride,
    const N* norm,
    float eps,
    const T* w,
    const float* bias,
    T* normed,
    float* weights,
    int64_t* ids,
    int64_t tokens,
    int64_t D,
    const Routing& r,
    int threads) {
  const int64_t rows = r.E + r.gated, stride = padded(D), scores = padded(rows), k = r.top_k + r.shared;
  float* wide = scratch<0>(tokens * (stride + scores));
  float* logits = wide + tokens * stride;
  widen(x, x_stride, norm, eps, tokens, D, wide);
  for (int64_t t = 0; t < tokens; t++)
    in_lanes(D, [&](int64_t i, int64_t n) { store(normed + t * D + i, load(wide + t * stride + i), n); });
  constexpr int64_t CHUNK = 32;
  parallel_for(worth(threads, rows * D * (int64_t)sizeof(T)), (rows + CHUNK - 1) / CHUNK, [&](int64_t c) {
    int64_t first = c * CHUNK, count = rows - first < CHUNK ? rows - first : CHUNK;
    rows_times(w + first * D, count, D, wide, stride, tokens, logits + first, scores);
  });
  for (int64_t t = 0; t < tokens; t++) route(r, logits + t * scores, bias, weights + t * k, ids + t * k);
}

// Many tokens: a panel with all that follows from it is a task.
template <class T, class N>
void norm_router_many(
    const T* x,
    int64_t x_stride,
    const N* norm,
    float eps,
    const T* w,
    const float* bias,
    T* normed,
    float* weights,
    int64_t* ids,
    int64_t tokens,
    int64_t D,
    const Routing& r,
    int threads) {
  const int64_t rows = r.E + r.gated, scores = padded(rows), k = r.top_k + r.shared;
  const int64_t words = words_of<T>(D), chunk = rows_of_product(words);
  parallel_for(worth_products(threads, tokens * D * rows), panels_of(tokens), [&](int64_t p) {
    const int64_t first = p * PANEL, count = tokens - first < PANEL ? tokens - first : PANEL;
    float* panel = scratch<1>(words * PANEL + PANEL * (rows + scores) + chunk * words);
    float *products = panel + words * PANEL, *logits = products + rows * PANEL, *room = logits + PANEL * scores;
    pack_words(count, words, panel, [&](int64_t t, float* row) {
      words_of_row(x + (first + t) * x_stride, norm, eps, D, row);
      T* out = normed + (first + t) * D;
      if constexpr (PAIRS<T>)
        memcpy(out, row, D * sizeof(T));
      else
        in_lanes(D, [&](int64_t i, int64_t n) { store(out + i, load(row + i, n), n); });
    });
    for (int64_t row = 0; row < rows; row += chunk) {
      const int64_t some = rows - row < chunk ? rows - row : chunk;
      panel_product<PAIRS<T>>(
          rows_for<T>(PlainMatrix<T>{w, D}, row, some, room), some, words, panel, vectors_of(count),
          products + row * PANEL, false);
    }
    unpack(products, rows, count, [&](int64_t t, int64_t e, int64_t, Vec v) { store(logits + t * scores + e, v); });
    for (int64_t t = 0; t < count; t++)
      route(r, logits + t * scores, bias, weights + (first + t) * k, ids + (first + t) * k);
  });
}

}  // namespace

extern "C" void thalweg_norm_router(
    int many,
    int dtype,
    const void* x,
    int64_t x_stride,
    int norm_dtype,
    const void* norm,
    float eps,
    const void* w,
    const float* bias,
    void* normed,
    float* weights,
    int64_t* ids,
    int64_t tokens,
    int64_t D,
    int64_t E,
    int64_t top_k,
    int64_t groups,
    int64_t topk_groups,
    int64_t shared,
    int softmax,
    int renormalize,
    int gated,
    float scale,
    int threads) {
  Routing r{E, top_k, groups, topk_groups, shared, softmax != 0, renormalize != 0, gated != 0, scale};
  auto run = [&](auto t, auto n) {
    using T = decltype(t);
    using N = decltype(n);
    (many ? norm_router_many<T, N> : norm_router<T, N>)(
        (const T*)x, x_stride, (const N*)norm, eps, (const T*)w, bias, (T*)normed, weights, ids, tokens, D, r, threads);
  };
  if (dtype == FLOAT32)
    run(float{}, float{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

THALWEG_RECORDABLE(norm_router)
