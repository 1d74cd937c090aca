// What the mixers of gated delta rules share, for decode and for prompts.
#pragma once

#include "rows.h"

namespace thalweg {

// One convolution's tap weights for `count` channels from `first`, tap after tap.
template <class T>
inline void taps_of(const T* weight, int64_t taps, int64_t first, int64_t count, float* out) {
  for (int64_t c = 0; c < count; c++)
    for (int64_t w = 0; w < taps; w++) out[w * count + c] = to_float(weight[(first + c) * taps + w]);
}

// x *= factor / |x|
inline void normalise(float* x, int64_t K, float factor) {
  Vec squares = {};
  for (int64_t k = 0; k < K; k += LANES) squares += load(x + k) * load(x + k);
  float scale = factor / std::sqrt(sum(squares) + 1e-6f);
  for (int64_t k = 0; k < K; k += LANES) store(x + k, load(x + k) * scale);
}

// y = rms_norm(o) * sigmoid(gate), or * silu(gate)
template <class T, class N, class G>
inline void gated_norm(float* o, const G* gate, const N* weight, float eps, int64_t V, bool with_silu, T* y) {
  Vec squares = {};
  for (int64_t v = 0; v < V; v += LANES) {
    Vec ov = rounded<T>(load(o + v));
    store(o + v, ov);
    squares += ov * ov;
  }
  float scale = 1.f / std::sqrt(sum(squares) / V + eps);
  for (int64_t v = 0; v < V; v += LANES) {
    Vec g = rounded<T>(load(gate + v));
    store(y + v, load(o + v) * scale * load(weight + v) * (with_silu ? silu(g) : sigmoid(g)));
  }
}

}  // namespace thalweg
