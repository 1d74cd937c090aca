// Op "split_norms".
#include "attend.h"
#include "recording.h"

using namespace thalweg;

namespace {

template <class T, class N>
void normed(const T* x, const N* weight, float eps, int64_t columns, T* y) {
  float* wide = scratch<1>(padded(columns));
  widen(x, 0, weight, eps, 1, columns, wide);
  in_lanes(columns, [&](int64_t i, int64_t n) { store(y + i, load(wide + i), n); });
}

template <class T, class N>
void split_norms(
    const T* x,
    int64_t x_stride,
    const N* q_weight,
    const N* kv_weight,
    float eps,
    const int64_t* positions,
    const float* frequencies,
    float rope_scale,
    T* blocks,
    const int64_t* block_rows,
    T* q,
    int64_t tokens,
    int64_t Q,
    int64_t R,
    int64_t P,
    int64_t pairs,
    int threads) {
  parallel_for(worth(threads, 2 * tokens * (Q + R + P) * (int64_t)sizeof(T)), tokens, [&](int64_t t) {
    const T* latent = x + t * x_stride + Q;
    T* row = blocks + block_rows[t] * (R + P);
    if (q_weight) normed(x + t * x_stride, q_weight, eps, Q, q + t * Q);
    normed(latent, kv_weight, eps, R, row);
    const T* key = latent + R;
    float *cosines = scratch<2>(2 * pairs), *sines = cosines + pairs;
    turns(positions[t], frequencies, pairs, rope_scale, cosines, sines);
    for (int64_t i = 0; i < pairs; i++) {
      float even = to_float(key[2 * i]), odd = to_float(key[2 * i + 1]);
      put(row + R + 2 * i, even * cosines[i] - odd * sines[i]);
      put(row + R + 2 * i + 1, odd * cosines[i] + even * sines[i]);
    }
    memcpy(row + R + 2 * pairs, key + 2 * pairs, (P - 2 * pairs) * sizeof(T));
  });
}

}  // namespace

// Without a weight for q, Q is 0. pairs: of the shared part's values that are turned, P / 2 or 0.
extern "C" void thalweg_split_norms(
    int dtype,
    const void* x,
    int64_t x_stride,
    int norm_dtype,
    const void* q_weight,
    const void* kv_weight,
    float eps,
    const int64_t* positions,
    const float* frequencies,
    float rope_scale,
    void* blocks,
    const int64_t* block_rows,
    void* q,
    int64_t tokens,
    int64_t Q,
    int64_t R,
    int64_t P,
    int64_t pairs,
    int threads) {
  auto run = [&](auto t, auto n) {
    using T = decltype(t);
    using N = decltype(n);
    split_norms(
        (const T*)x, x_stride, (const N*)q_weight, (const N*)kv_weight, eps, positions, frequencies, rope_scale,
        (T*)blocks, block_rows, (T*)q, tokens, Q, R, P, pairs, threads);
  };
  if (dtype == FLOAT32)
    norm_dtype == FLOAT32 ? run(float{}, float{}) : run(float{}, bf16{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

THALWEG_RECORDABLE(split_norms)
