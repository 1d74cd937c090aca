// Ops "kda_mixer_prefill" and "gdn_mixer_prefill": all of a layer between its projections, for prompts.
//
// The delta rule runs token by token: on a CPU that costs no more than its form in chunks, and is the definition. A task
// is a key head of a sequence with the value heads that share it. Its states lie transposed while it runs: value
// channels in the lanes need no sums over lanes, and a state is read and written once per token, since what token t adds
// waits until token t + 1 decays it. Values are rounded to T where the references round them.
#include <type_traits>

#include "delta.h"
#include "panels.h"

using namespace thalweg;

namespace {

constexpr int64_t RUN = 32;  // tokens whose inputs are made ready at a time
constexpr int VECTORS = LANES == 8 ? 2 : 4;  // of value channels at a time: as many as registers hold sums of

// Inputs of a run for one value head, each token's in a row.
struct Inputs {
  const float *q, *k, *decay, *v;  // [K], [K], [K] or one for all channels, [V]
  int64_t v_stride;
  bool one_decay;
  const float *beta, *qk;  // qk: q . k
};

// o [tokens, V] of N vectors of value channels, and their state [K, N vectors] moved on.
template <int N>
inline void delta_rule(float* state, const Inputs& in, int64_t tokens, int64_t K, int64_t V, float* o) {
  constexpr int64_t WIDTH = N * LANES;
  Vec u[N] = {};
  const float* written = in.k;  // the key that u is added along
  for (int64_t t = 0; t < tokens; t++) {
    const float *q = in.q + t * K, *k = in.k + t * K, *decay = in.decay + (in.one_decay ? t : t * K);
    Vec dk[N] = {}, dq[N] = {};
    for (int64_t i = 0; i < K; i++) {
      const Vec a = splat(decay[in.one_decay ? 0 : i]), w = splat(written[i]), ki = splat(k[i]), qi = splat(q[i]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        float* at = state + i * WIDTH + n * LANES;
        Vec d = (load(at) + w * u[n]) * a;
        dk[n] += d * ki;
        dq[n] += d * qi;
        store(at, d);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      u[n] = in.beta[t] * (load(in.v + t * in.v_stride + n * LANES) - dk[n]);
      store(o + t * V + n * LANES, dq[n] + u[n] * in.qk[t]);
    }
    written = k;
  }
  for (int64_t i = 0; i < K; i++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      float* at = state + i * WIDTH + n * LANES;
      store(at, load(at) + splat(written[i]) * u[n]);
    }
}

// Parts of a state's value channels: f(first one, their number, N as a type). Each part lies by itself, so that its rows
// follow each other and stay in the nearest cache.
template <class F>
inline void parts_of(int64_t V, F&& f) {
  int64_t v = 0;
  for (; v + VECTORS * LANES <= V; v += VECTORS * LANES) f(v, VECTORS * LANES, std::integral_constant<int, VECTORS>{});
  for (; v < V; v += LANES) f(v, (int64_t)LANES, std::integral_constant<int, 1>{});
}

void all_channels(float* state, const Inputs& in, int64_t tokens, int64_t K, int64_t V, float* o) {
  parts_of(V, [&](int64_t v, int64_t, auto n) {
    Inputs of_part = in;
    of_part.v += v;
    delta_rule<n()>(state + v * K, of_part, tokens, K, V, o + v);
  });
}

constexpr int MOST_SEEN = 16;  // inputs that a convolution remembers, as Python knows

// y = silu(convolution) of a vector of channels over n tokens. `seen` has the W inputs before them, oldest first, and
// moves on; W is known to the compiler if SEEN is not 0. Outputs follow each other as `channels` says, as taps do.
template <class T, int SEEN>
inline void convolve(
    const T* x, int64_t x_stride, int64_t n, float* seen, int64_t seen_stride, const float* taps, int64_t W,
    int64_t channels, float* y) {
  if (SEEN) W = SEEN;
  Vec window[SEEN ? SEEN : MOST_SEEN], tap[(SEEN ? SEEN : MOST_SEEN) + 1];
#pragma GCC unroll 4
  for (int64_t w = 0; w < W; w++) window[w] = load(seen + w * seen_stride);
#pragma GCC unroll 4
  for (int64_t w = 0; w <= W; w++) tap[w] = load(taps + w * channels);
  for (int64_t t = 0; t < n; t++) {
    Vec now = load(x + t * x_stride), sum = {};
#pragma GCC unroll 4
    for (int64_t w = 0; w < W; w++) {
      sum += window[w] * tap[w];
      window[w] = w + 1 < W ? window[w + 1] : now;
    }
    sum += now * tap[W];
    store(y + t * channels, rounded<T>(silu(sum)));
  }
#pragma GCC unroll 4
  for (int64_t w = 0; w < W; w++) store(seen + w * seen_stride, window[w]);
}

struct Shape {
  int64_t B, G, H, K, V, W;  // G key heads
  int64_t channels() const { return 2 * G * K + H * V; }
};

// Where a call's sequences are and where their states go. A sequence has offsets[b] .. offsets[b + 1].
struct Sequences {
  const int64_t *slots, *offsets, *boundaries;  // boundaries: [n, 3], a sequence, tokens of it, a slot
  int64_t num_boundaries;

  // Tokens of sequence b, which has done `done` of `all`, until its states are wanted.
  int64_t until(int64_t b, int64_t done, int64_t all) const {
    int64_t next = all;
    for (int64_t i = 0; i < num_boundaries; i++)
      if (boundaries[3 * i] == b && boundaries[3 * i + 1] > done && boundaries[3 * i + 1] < next) next = boundaries[3 * i + 1];
    return next - done;
  }

  // f(slot) for each that gets the states of sequence b after `done` of its tokens.
  template <class F>
  void at(int64_t b, int64_t done, F&& f) const {
    for (int64_t i = 0; i < num_boundaries; i++)
      if (boundaries[3 * i] == b && boundaries[3 * i + 1] == done) f(boundaries[3 * i + 2]);
  }
};

// prepare(token, value head, decay, beta) fills those, finish(token, value head, o) takes the head's output.
template <class T, class S, class Prepare, class Finish>
void prefill(
    const T* x,
    int64_t x_stride,
    const T* conv_weight,
    T* conv_state,
    S* state,
    const Sequences& sequences,
    const Shape& s,
    bool one_decay,
    Prepare&& prepare,
    Finish&& finish,
    int threads) {
  const int64_t ratio = s.H / s.G, own = 2 * s.K + ratio * s.V, C = s.channels(), W = s.W;
  const int64_t tokens = sequences.offsets[s.B];
  parallel_for(worth(threads, 2 * tokens * s.H * s.V * s.K), s.B * s.G, [&](int64_t task) {
    const int64_t b = task / s.G, g = task % s.G;
    const int64_t start = sequences.offsets[b], all = sequences.offsets[b + 1] - start, slot = sequences.slots[b];
    if (!all) return;
    // The task's channels of q, k and v.
    const int64_t first[3] = {g * s.K, (s.G + g) * s.K, 2 * s.G * s.K + g * ratio * s.V};
    const int64_t count[3] = {s.K, s.K, ratio * s.V}, at[3] = {0, s.K, 2 * s.K};
    float* room = scratch<1>((2 * W + 1) * own + RUN * (own + s.K + s.V + 2) + ratio * s.K * s.V);
    float *taps = room, *seen = taps + (W + 1) * own, *y = seen + W * own, *decay = y + RUN * own;
    float *o = decay + RUN * s.K, *beta = o + RUN * s.V, *qk = beta + RUN, *states = qk + RUN;
    for (int i = 0; i < 3; i++) {
      taps_of(conv_weight, W + 1, first[i], count[i], taps + (W + 1) * at[i]);
      for (int64_t w = 0; w < W; w++)
        widen(conv_state + (slot * W + w) * C + first[i], 0, (const T*)nullptr, 0.f, 1, count[i], seen + w * own + at[i]);
    }
    float* rows = scratch<2>(s.K * s.V);
    for (int64_t j = 0; j < ratio; j++) {
      widen(state + (slot * s.H + g * ratio + j) * s.V * s.K, 0, (const T*)nullptr, 0.f, 1, s.V * s.K, rows);
      parts_of(s.V, [&](int64_t v, int64_t width, auto) {
        transpose(rows + v * s.K, s.K, width, s.K, states + (j * s.V + v) * s.K, width);
      });
    }
    auto put_states = [&](int64_t to, bool last) {
      for (int i = 0; i < 3; i++)
        for (int64_t w = 0; w < W; w++)
          in_lanes(count[i], [&](int64_t c, int64_t n) {
            store(conv_state + (to * W + w) * C + first[i] + c, load(seen + w * own + at[i] + c, n), n);
          });
      for (int64_t j = 0; j < ratio; j++) {
        parts_of(s.V, [&](int64_t v, int64_t width, auto) {
          transpose(states + (j * s.V + v) * s.K, width, s.K, width, rows + v * s.K, s.K);
        });
        S* stored = state + (to * s.H + g * ratio + j) * s.V * s.K;
        in_lanes(s.V * s.K, [&](int64_t i, int64_t n) { store(stored + i, load(rows + i, n), n); });
      }
      if (sizeof(S) < 4 && !last)  // goes on as a sequence would that begins from it
        in_lanes(ratio * s.K * s.V, [&](int64_t i, int64_t n) { store(states + i, rounded<S>(load(states + i, n)), n); });
    };
    for (int64_t done = 0; done < all;) {
      int64_t n = sequences.until(b, done, all);
      n = n < RUN ? n : RUN;
      float* parts[3] = {y, y + RUN * s.K, y + 2 * RUN * s.K};
      for (int i = 0; i < 3; i++)
        for (int64_t c = 0; c < count[i]; c += LANES) {
          const T* in = x + (start + done) * x_stride + first[i] + c;
          float *window = seen + at[i] + c, *out = parts[i] + c;
          const float* tap = taps + (W + 1) * at[i] + c;
          if (W == 3)
            convolve<T, 3>(in, x_stride, n, window, own, tap, W, count[i], out);
          else
            convolve<T, 0>(in, x_stride, n, window, own, tap, W, count[i], out);
        }
      float *q = parts[0], *k = parts[1], *v = parts[2];
      for (int64_t t = 0; t < n; t++) {
        normalise(q + t * s.K, s.K, 1.f / std::sqrt((float)s.K));
        normalise(k + t * s.K, s.K, 1.f);
        Vec products = {};
        for (int64_t i = 0; i < s.K; i += LANES) products += load(q + t * s.K + i) * load(k + t * s.K + i);
        qk[t] = sum(products);
      }
      for (int64_t j = 0; j < ratio; j++) {
        const int64_t h = g * ratio + j;
        for (int64_t t = 0; t < n; t++) prepare(start + done + t, h, decay + (one_decay ? t : t * s.K), beta[t]);
        Inputs in{q, k, decay, v + j * s.V, ratio * s.V, one_decay, beta, qk};
        all_channels(states + j * s.K * s.V, in, n, s.K, s.V, o);
        for (int64_t t = 0; t < n; t++) finish(start + done + t, h, o + t * s.V);
      }
      done += n;
      sequences.at(b, done, [&](int64_t to) { put_states(to, done == all); });
    }
    put_states(slot, true);
  });
}

// f(element of activations, element of states, element of the norm's weight)
template <class F>
void of_types(int dtype, int state_dtype, int norm_dtype, F&& f) {
  auto states = [&](auto t, auto n) { state_dtype == FLOAT32 ? f(t, float{}, n) : f(t, bf16{}, n); };
  if (dtype == FLOAT32)
    states(float{}, float{});
  else
    norm_dtype == FLOAT32 ? states(bf16{}, float{}) : states(bf16{}, bf16{});
}

}  // namespace

extern "C" void thalweg_kda_prefill(
    int dtype,
    int state_dtype,
    int norm_dtype,
    const void* proj,
    int64_t proj_stride,
    const void* up,
    int64_t up_token,
    int64_t up_part,
    const void* conv_weight,
    void* conv_state,
    const float* A_log,
    const float* dt_bias,
    const void* norm,
    float eps,
    void* state,
    const int64_t* slots,
    const int64_t* offsets,
    const int64_t* boundaries,
    int64_t num_boundaries,
    void* out,
    int64_t B,
    int64_t H,
    int64_t K,
    int64_t W,
    int threads) {
  of_types(dtype, state_dtype, norm_dtype, [&](auto t, auto s, auto n) {
    using T = decltype(t);
    using S = decltype(s);
    using N = decltype(n);
    Shape shape{B, H, H, K, K, W};
    auto of_up = [&](int64_t token, int part, int64_t h) { return (const T*)up + token * up_token + part * up_part + h * K; };
    auto prepare = [&](int64_t token, int64_t h, float* decay, float& beta) {
      const float rate = -std::exp(A_log[h]);
      const T* f = of_up(token, 0, h);
      for (int64_t k = 0; k < K; k += LANES)
        store(decay + k, exp(rate * softplus(load(f + k) + load(dt_bias + h * K + k))));
      beta = sigmoid(to_float(((const T*)proj)[token * proj_stride + 3 * H * K + h]));
    };
    auto finish = [&](int64_t token, int64_t h, float* o) {
      gated_norm(o, of_up(token, 1, h), (const N*)norm, eps, K, false, (T*)out + (token * H + h) * K);
    };
    prefill(
        (const T*)proj, proj_stride, (const T*)conv_weight, (T*)conv_state, (S*)state,
        Sequences{slots, offsets, boundaries, num_boundaries}, shape, false, prepare, finish, threads);
  });
}

extern "C" void thalweg_gdn_prefill(
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
    const int64_t* offsets,
    const int64_t* boundaries,
    int64_t num_boundaries,
    void* out,
    int64_t B,
    int64_t G,
    int64_t H,
    int64_t K,
    int64_t V,
    int64_t W,
    int threads) {
  of_types(dtype, state_dtype, FLOAT32, [&](auto t, auto s, auto) {
    using T = decltype(t);
    using S = decltype(s);
    Shape shape{B, G, H, K, V, W};
    auto at = [&](int64_t token, int64_t column) {  // behind the convolution's columns: z, b and a
      return (const T*)proj + token * proj_stride + shape.channels() + column;
    };
    auto prepare = [&](int64_t token, int64_t h, float* decay, float& beta) {
      *decay = std::exp(-std::exp(A_log[h]) * softplus(to_float(*at(token, H * V + H + h)) + dt_bias[h]));
      beta = sigmoid(to_float(*at(token, H * V + h)));
    };
    auto finish = [&](int64_t token, int64_t h, float* o) {
      gated_norm(o, at(token, h * V), norm, eps, V, true, (T*)out + (token * H + h) * V);
    };
    prefill(
        (const T*)proj, proj_stride, (const T*)conv_weight, (T*)conv_state, (S*)state,
        Sequences{slots, offsets, boundaries, num_boundaries}, shape, true, prepare, finish, threads);
  });
}
