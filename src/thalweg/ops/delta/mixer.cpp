// Ops "kda_mixer_decode" and "gdn_mixer_decode": all of a layer between its projections, for one token of each sequence.
//
// A task is a key head with the value heads that share it, for all sequences in order: it owns their channels of the
// convolution and their states. Written out, with D the decayed state: u = beta (v - D k), o = D q + u (q . k), and the
// new state D + u k^T, so a state is read and written once. Values are rounded to T where
// the references round them, which serve prompts: the same token comes out of both as nearly alike as can be.
#include "delta.h"
#include "recording.h"

using namespace thalweg;

namespace {

// y = silu(convolution) of `count` channels from `first`; their state, W inputs of `channels` each, moves on by one.
template <class T>
void convolve(const T* x, T* state, int64_t W, int64_t channels, int64_t first, int64_t count, const float* taps, float* y) {
  in_lanes(count, [&](int64_t c, int64_t n) {
    Vec sum = {};
    T* at = state + first + c;
    for (int64_t w = 0; w < W; w++) {
      sum += load(at + w * channels, n) * load(taps + w * count + c, n);
      if (w) memcpy(at + (w - 1) * channels, at + w * channels, n * sizeof(T));
    }
    const T* now = x + first + c;
    sum += load(now, n) * load(taps + W * count + c, n);
    if (W) memcpy(at + (W - 1) * channels, now, n * sizeof(T));
    store(y + c, rounded<T>(silu(sum)), n);
  });
}

constexpr int64_t ROWS_AHEAD = 16;  // that are on their way from memory: the processor does not see where states go on

// o[v] of V rows of a state [V, K], which becomes the new one; `next` is the one to follow. q, k and decay are K long, a
// multiple of LANES.
template <class S>
void delta_rule(
    S* state,
    const S* next,
    const float* q,
    const float* k,
    const float* v,
    const float* decay,
    float beta,
    int64_t V,
    int64_t K,
    float* o) {
  Vec products = {};
  for (int64_t i = 0; i < K; i += LANES) products += load(q + i) * load(k + i);
  float qk = sum(products);
  for (int64_t row = 0; row + 4 <= V; row += 4) {
    S* at = state + row * K;
    const S* ahead = row + ROWS_AHEAD < V ? at + ROWS_AHEAD * K : next + (row + ROWS_AHEAD - V) * K;
    for (int64_t i = 0; i < 4 * K; i += 64 / (int64_t)sizeof(S)) __builtin_prefetch(ahead + i, 1);
    Vec dk[4] = {}, dq[4] = {};
    for (int64_t i = 0; i < K; i += LANES) {
      Vec g = load(decay + i), ki = load(k + i), qi = load(q + i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        Vec d = load(at + r * K + i) * g;
        dk[r] += d * ki;
        dq[r] += d * qi;
      }
    }
    float u[4], oq[4];
    sum4(dk[0], dk[1], dk[2], dk[3], u);
    sum4(dq[0], dq[1], dq[2], dq[3], oq);
    for (int r = 0; r < 4; r++) {
      u[r] = beta * (v[row + r] - u[r]);
      o[row + r] = oq[r] + u[r] * qk;
    }
    for (int64_t i = 0; i < K; i += LANES) {
      Vec g = load(decay + i), ki = load(k + i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) store(at + r * K + i, load(at + r * K + i) * g + ki * u[r]);
    }
  }
}

// The first state of the task that begins with head h, which may well be this thread's; any state if there is none.
template <class S>
inline const S* next_task(const S* state, const int64_t* slots, int64_t H, int64_t h, int64_t size) {
  return state + (slots[0] * H + (h < H ? h : 0)) * size;
}

template <class T, class S, class N>
void kda(
    const T* proj,
    int64_t proj_stride,
    const T* conv_weight,
    T* conv_state,
    const T* w_up,
    const float* A_log,
    const float* dt_bias,
    const N* norm,
    float eps,
    S* state,
    const int64_t* slots,
    T* out,
    int64_t B,
    int64_t H,
    int64_t K,
    int64_t R,
    int64_t W,
    int threads) {
  int64_t C = 3 * H * K, low_stride = padded(R);
  float* low = scratch<0>(2 * B * low_stride);
  for (int i = 0; i < 2; i++)
    widen(proj + C + H + i * R, proj_stride, (const T*)nullptr, 0.f, B, R, low + i * B * low_stride);
  threads = worth(threads, H * (2 * K * R * (int64_t)sizeof(T) + B * K * K * (int64_t)sizeof(S)));
  parallel_for(threads, H, [&](int64_t h) {
    float* room = scratch<1>((W + 1) * 3 * K + 2 * B * K + 4 * K);
    float *taps = room, *up = taps + (W + 1) * 3 * K, *y = up + 2 * B * K, *o = y + 3 * K;
    for (int i = 0; i < 3; i++) taps_of(conv_weight, W + 1, (i * H + h) * K, K, taps + i * (W + 1) * K);
    for (int i = 0; i < 2; i++)
      rows_times(w_up + (i * H + h) * K * R, K, R, low + i * B * low_stride, low_stride, B, up + i * B * K, K);
    float rate = -std::exp(A_log[h]);
    for (int64_t b = 0; b < B; b++) {
      const T* x = proj + b * proj_stride;
      for (int i = 0; i < 3; i++)
        convolve(x, conv_state + slots[b] * W * C, W, C, (i * H + h) * K, K, taps + i * (W + 1) * K, y + i * K);
      normalise(y, K, 1.f / std::sqrt((float)K));
      normalise(y + K, K, 1.f);
      float* decay = up + b * K;
      for (int64_t k = 0; k < K; k += LANES)
        store(decay + k, exp(rate * softplus(rounded<T>(load(decay + k)) + load(dt_bias + h * K + k))));
      float beta = sigmoid(to_float(x[C + h]));
      S* own = state + (slots[b] * H + h) * K * K;
      const S* next = b + 1 < B ? state + (slots[b + 1] * H + h) * K * K : next_task(state, slots, H, h + 1, K * K);
      delta_rule(own, next, y, y + K, y + 2 * K, decay, beta, K, K, o);
      gated_norm(o, up + (B + b) * K, norm, eps, K, false, out + (b * H + h) * K);
    }
  });
}

template <class T, class S>
void gdn(
    const T* proj,
    int64_t proj_stride,
    const T* conv_weight,
    T* conv_state,
    const float* A_log,
    const float* dt_bias,
    const float* norm,
    float eps,
    S* state,
    const int64_t* slots,
    T* out,
    int64_t B,
    int64_t G,
    int64_t H,
    int64_t K,
    int64_t V,
    int64_t W,
    int threads) {
  int64_t C = 2 * G * K + H * V, ratio = H / G;
  threads = worth(threads, B * H * V * K * (int64_t)sizeof(S));
  parallel_for(threads, G, [&](int64_t g) {
    int64_t own = 2 * K + ratio * V;  // channels of the task
    float* room = scratch<1>((W + 1) * own + own + K + V);
    float *taps = room, *y = taps + (W + 1) * own, *decay = y + own, *o = decay + K;
    int64_t first[3] = {g * K, (G + g) * K, 2 * G * K + g * ratio * V}, count[3] = {K, K, ratio * V};
    int64_t at[3] = {0, K, 2 * K};
    for (int i = 0; i < 3; i++) taps_of(conv_weight, W + 1, first[i], count[i], taps + (W + 1) * at[i]);
    for (int64_t b = 0; b < B; b++) {
      const T* x = proj + b * proj_stride;
      for (int i = 0; i < 3; i++)
        convolve(x, conv_state + slots[b] * W * C, W, C, first[i], count[i], taps + (W + 1) * at[i], y + at[i]);
      normalise(y, K, 1.f / std::sqrt((float)K));
      normalise(y + K, K, 1.f);
      for (int64_t h = g * ratio; h < (g + 1) * ratio; h++) {
        const T* of_head = x + C + H * V + h;  // b, and H columns on a
        float rate = std::exp(-std::exp(A_log[h]) * softplus(to_float(of_head[H]) + dt_bias[h]));
        for (int64_t k = 0; k < K; k += LANES) store(decay + k, splat(rate));
        float* v = y + 2 * K + (h - g * ratio) * V;
        S* own = state + (slots[b] * H + h) * V * K;
        const S* next = h + 1 < (g + 1) * ratio ? own + V * K
                        : b + 1 < B             ? state + (slots[b + 1] * H + g * ratio) * V * K
                                                : next_task(state, slots, H, h + 1, V * K);
        delta_rule(own, next, y, y + K, v, decay, sigmoid(to_float(*of_head)), V, K, o);
        gated_norm(o, x + C + h * V, norm, eps, V, true, out + (b * H + h) * V);
      }
    }
  });
}

}  // namespace

extern "C" void thalweg_kda_mixer(
    int dtype,
    int state_dtype,
    int norm_dtype,
    const void* proj,
    int64_t proj_stride,
    const void* conv_weight,
    void* conv_state,
    const void* w_up,
    const float* A_log,
    const float* dt_bias,
    const void* norm,
    float eps,
    void* state,
    const int64_t* slots,
    void* out,
    int64_t B,
    int64_t H,
    int64_t K,
    int64_t R,
    int64_t W,
    int threads) {
  auto run = [&](auto t, auto s, auto n) {
    using T = decltype(t);
    using S = decltype(s);
    using N = decltype(n);
    kda<T, S, N>(
        (const T*)proj, proj_stride, (const T*)conv_weight, (T*)conv_state, (const T*)w_up, A_log, dt_bias,
        (const N*)norm, eps, (S*)state, slots, (T*)out, B, H, K, R, W, threads);
  };
  if (dtype == FLOAT32)
    state_dtype == FLOAT32 ? run(float{}, float{}, float{}) : run(float{}, bf16{}, float{});
  else if (norm_dtype == FLOAT32)
    state_dtype == FLOAT32 ? run(bf16{}, float{}, float{}) : run(bf16{}, bf16{}, float{});
  else
    state_dtype == FLOAT32 ? run(bf16{}, float{}, bf16{}) : run(bf16{}, bf16{}, bf16{});
}

extern "C" void thalweg_gdn_mixer(
    int dtype,
    int state_dtype,
    const void* proj,
    int64_t proj_stride,
    const void* conv_weight,
    void* conv_state,
    const float* A_log,
    const float* dt_bias,
    const float* norm,
    float eps,
    void* state,
    const int64_t* slots,
    void* out,
    int64_t B,
    int64_t G,
    int64_t H,
    int64_t K,
    int64_t V,
    int64_t W,
    int threads) {
  auto run = [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    gdn<T, S>(
        (const T*)proj, proj_stride, (const T*)conv_weight, (T*)conv_state, A_log, dt_bias, norm, eps, (S*)state, slots,
        (T*)out, B, G, H, K, V, W, threads);
  };
  if (dtype == FLOAT32)
    state_dtype == FLOAT32 ? run(float{}, float{}) : run(float{}, bf16{});
  else
    state_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

THALWEG_RECORDABLE(kda_mixer)
THALWEG_RECORDABLE(gdn_mixer)
