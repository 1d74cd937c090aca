// Op "experts" over weights in the model's dtype or in GGML's blocks: one pass for the products of gate and up, one for those of down with
// the weighted sum and the residual.
//
// The pairs of token and expert are sorted by expert, so that a weight is read once for all its tokens. A token's sum
// over its experts is in the order of its ids. Values are rounded to T where the reference rounds them, which serves
// prompts: the same token comes out of both as nearly alike as can be.
#include "int8.h"
#include "recording.h"

using namespace thalweg;

namespace {

// Rows of a weight in a task: many, so that memory is read on and on, but a share for every thread, and products that
// stay near.
inline int64_t rows_of_chunk(int64_t rows, int64_t parts, int64_t pairs) {
  const int64_t most = (1 << 14) / (pairs < 1 ? 1 : pairs), share = (rows + parts - 1) / parts;
  const int64_t chunk = (share < most ? share : most) / 32 * 32;
  return chunk < 32 ? 32 : chunk;
}

// False if an id is none of the experts'.
template <class T, class GateUp, class Down>
bool experts(
    const T* x,
    int64_t x_stride,
    const float* weights,
    const int64_t* ids,
    const GateUp& gate_up,
    const Down& down,
    const T* residual,
    int64_t residual_stride,
    T* y,
    int64_t tokens,
    int64_t k,
    int64_t E,
    int64_t D,
    int64_t I,
    int threads) {
  int64_t pairs = tokens * k, wide = padded(D), inner = padded(I);
  // Where each expert's pairs begin, which pair of the caller's stands where, and which experts have any.
  int64_t* begin = (int64_t*)scratch<2>(2 * (E + 1 + 2 * pairs + E));
  int64_t *place = begin + E + 1, *order = place + pairs, *used = order + pairs, count_used = 0;
  for (int64_t e = 0; e <= E; e++) begin[e] = 0;
  for (int64_t p = 0; p < pairs; p++) {
    if (ids[p] < 0 || ids[p] >= E) return false;
    begin[ids[p] + 1]++;
  }
  for (int64_t e = 0; e < E; e++) {
    if (begin[e + 1]) used[count_used++] = e;
    begin[e + 1] += begin[e];
  }
  for (int64_t p = pairs; p-- > 0;) {  // from behind: what begins at begin[e] afterwards began at begin[e + 1] before
    place[p] = --begin[ids[p] + 1];
    order[place[p]] = p;
  }
  // begin[e + 1] is now where expert e begins; the next one's beginning is where it ends.
  auto first = [&](int64_t e) { return begin[e + 1]; };
  auto end = [&](int64_t e) { return e + 1 < E ? begin[e + 2] : pairs; };

  float* wide_x = scratch<0>(pairs * (wide + inner));
  float* hidden = wide_x + pairs * wide;
  for (int64_t i = 0; i < pairs; i++)
    widen(x + order[i] / k * x_stride, 0, (const T*)nullptr, 0.f, 1, D, wide_x + i * wide);
  if constexpr (requires { gate_up.round(wide_x); })
    for (int64_t i = 0; i < pairs; i++) gate_up.round(wide_x + i * wide);
  if (inner != I) memset(hidden, 0, 4 * pairs * inner);

  int64_t bytes = count_used * D * down.row_bytes();
  int64_t of_threads = threads == 1 ? 1 : 2 * threads;
  int64_t chunk = rows_of_chunk(I, (of_threads + count_used - 1) / (count_used ? count_used : 1), pairs);
  int64_t chunks = (I + chunk - 1) / chunk;
  parallel_for(worth(threads, 2 * bytes), count_used * chunks, [&](int64_t task) {
    int64_t e = used[task / chunks], row = task % chunks * chunk, rows = I - row < chunk ? I - row : chunk;
    int64_t n = end(e) - first(e);
    float* gate = scratch<1>(2 * n * chunk);
    float* up = gate + n * chunk;
    const float* in = wide_x + first(e) * wide;
    GateUp w = gate_up.from(e, 2 * I);
    w.times(row, rows, in, wide, n, gate, chunk);
    w.times(I + row, rows, in, wide, n, up, chunk);
    for (int64_t i = 0; i < n; i++)
      in_lanes(rows, [&](int64_t r, int64_t some) {
        Vec g = rounded<T>(load(gate + i * chunk + r, some)), u = rounded<T>(load(up + i * chunk + r, some));
        store(hidden + (first(e) + i) * inner + row + r, rounded<T>(silu(g) * u), some);
      });
  });

  if constexpr (requires { down.round(hidden); })
    parallel_for(worth(threads, 4 * pairs * I), pairs, [&](int64_t i) { down.round(hidden + i * inner); });

  int64_t out_chunk = rows_of_chunk(D, of_threads, pairs), out_chunks = (D + out_chunk - 1) / out_chunk;
  parallel_for(worth(threads, bytes), out_chunks, [&](int64_t task) {
    int64_t row = task * out_chunk, rows = D - row < out_chunk ? D - row : out_chunk;
    float* products = scratch<1>(pairs * out_chunk);
    for (int64_t u = 0; u < count_used; u++) {
      int64_t e = used[u], from = first(e);
      Down w = down.from(e, D);
      w.times(row, rows, hidden + from * inner, inner, end(e) - from, products + from * out_chunk, out_chunk);
    }
    for (int64_t t = 0; t < tokens; t++)
      in_lanes(rows, [&](int64_t r, int64_t some) {
        Vec total = {};
        for (int64_t j = t * k; j < (t + 1) * k; j++)
          total += rounded<T>(load(products + place[j] * out_chunk + r, some)) * weights[j];
        if (residual) total = rounded<T>(total) + load(residual + t * residual_stride + row + r, some);
        store(y + t * D + row + r, total, some);
      });
  });
  return true;
}

}  // namespace

// gate_up_segments 0: weights are in the model's dtype, and there are no types and rows. rounds: whether activations are
// rounded to 8 bits.
extern "C" int thalweg_experts(
    int dtype,
    const void* x,
    int64_t x_stride,
    const float* weights,
    const int64_t* ids,
    const void* gate_up,
    int gate_up_segments,
    const int32_t* gate_up_types,
    const int64_t* gate_up_rows,
    const void* down,
    int down_segments,
    const int32_t* down_types,
    const int64_t* down_rows,
    int rounds,
    const void* residual,
    int64_t residual_stride,
    void* y,
    int64_t tokens,
    int64_t k,
    int64_t E,
    int64_t D,
    int64_t I,
    int threads) {
  auto run = [&](auto t, const auto& in, const auto& out) {
    using T = decltype(t);
    return experts<T>(
        (const T*)x, x_stride, weights, ids, in, out, (const T*)residual, residual_stride, (T*)y, tokens, k, E, D, I,
        threads);
  };
  if (gate_up_segments) {
    BlockMatrix in{(const uint8_t*)gate_up, D, gate_up_segments, gate_up_types, gate_up_rows};
    BlockMatrix out{(const uint8_t*)down, I, down_segments, down_types, down_rows};
    auto both = [&](const auto& a, const auto& b) { return dtype == FLOAT32 ? run(float{}, a, b) : run(bf16{}, a, b); };
    return rounds ? both(RoundedMatrix{in}, RoundedMatrix{out}) : both(in, out);
  }
  if (dtype == FLOAT32)
    return run(float{}, PlainMatrix<float>{(const float*)gate_up, D}, PlainMatrix<float>{(const float*)down, I});
  return run(bf16{}, PlainMatrix<bf16>{(const bf16*)gate_up, D}, PlainMatrix<bf16>{(const bf16*)down, I});
}

THALWEG_RECORDABLE(experts)
