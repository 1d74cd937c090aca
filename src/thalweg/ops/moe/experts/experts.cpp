// Op "experts" over weights in the model's dtype or in GGML's blocks: one pass for the products of gate and up, one for
// those of down with the weighted sum and the residual.
//
// The pairs of token and expert are sorted by expert, so that a weight is read once for all its tokens. A token's sum
// over its experts is in the order of its ids. Values are rounded to T where the reference rounds them, which serves
// prompts: the same token comes out of both as nearly alike as can be.
#include "int8.h"
#include "products.h"
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

// Ids are known to be experts'.
template <class T, class GateUp, class Down>
void experts_of_few(
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
  for (int64_t p = 0; p < pairs; p++) begin[ids[p] + 1]++;
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
}

constexpr int64_t PAIRS_AT_ONCE = 1 << 14;  // of token and expert: a thread's products of a chunk stay near

struct Share {  // of an expert: its pairs, sorted, and its panels
  int64_t first, count, panel;
};

// Words of a panel's hidden values for rows r and r + 1.
template <class T, bool PAIR>
inline void store_hidden(float* panel, int64_t row, Vec even, Vec odd) {
  if constexpr (PAIR) {
    bf16 halves[2][LANES];
    store(halves[0], even), store(halves[1], odd);
    HVec low, high;
    memcpy(&low, halves[0], sizeof low), memcpy(&high, halves[1], sizeof high);
    store(panel + row / 2 * PANEL, (Vec)(__builtin_convertvector(low, UVec) | __builtin_convertvector(high, UVec) << 16));
  } else {
    store(panel + row * PANEL, rounded<T>(even));
    store(panel + (row + 1) * PANEL, rounded<T>(odd));
  }
}

// The same in panels of an expert's tokens.
template <class T, class GateUp, class Down>
void experts_of_many(
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
  using In = Products<T, GateUp>;
  using Out = Products<T, Down>;
  constexpr bool PAIR = Out::PAIR;
  // Hidden values lie in a panel as floats or pairs before they are what products take.
  const int64_t pairs = tokens * k, words = In{gate_up}.words(), stored = PAIR ? words_of<T>(I) : I;
  const int64_t inner = Out{down}.words() < stored ? stored : Out{down}.words();
  // Pairs sorted by expert: where each of the caller's stands, and which stands where.
  int64_t* place = (int64_t*)scratch<2>(2 * (2 * pairs + E));
  int64_t *order = place + pairs, *count = order + pairs;
  memset(count, 0, E * sizeof *count);
  for (int64_t p = 0; p < pairs; p++) count[ids[p]]++;
  Share* used = (Share*)scratch<3>(E * sizeof(Share) / 4);
  int64_t num_used = 0, sorted = 0, panels = 0;
  for (int64_t e = 0; e < E; e++) {
    if (count[e]) {
      used[num_used++] = {sorted, count[e], panels};
      panels += panels_of(count[e]);
    }
    sorted += count[e];
    count[e] = sorted - count[e];  // where the expert's next pair goes
  }
  for (int64_t p = 0; p < pairs; p++) order[place[p] = count[ids[p]]++] = p;
  int64_t* expert = (int64_t*)scratch<5>(2 * panels);  // of each panel, as its number in `used`
  for (int64_t u = 0; u < num_used; u++)
    for (int64_t p = 0; p < panels_of(used[u].count); p++) expert[used[u].panel + p] = u;
  auto id_of = [&](int64_t u) { return ids[order[used[u].first]]; };
  // Sorted pairs of a panel: f(its first one, how many).
  auto in_panel = [&](int64_t p, auto&& f) {
    const Share& of = used[expert[p]];
    int64_t before = (p - of.panel) * PANEL, n = of.count - before;
    f(of.first + before, n < PANEL ? n : PANEL);
  };

  float* x_panels = scratch<0>(panels * PANEL * (words + inner));
  float* hidden = x_panels + panels * PANEL * words;
  threads = worth_products(threads, 3 * pairs * D * I);
  parallel_for(threads, panels, [&](int64_t p) {
    in_panel(p, [&](int64_t first, int64_t n) {
      auto row = [&](int64_t t) { return x + order[first + t] / k * x_stride; };
      In{gate_up}.pack(n, row, (const T*)nullptr, 0.f, x_panels + p * PANEL * words);
    });
  });

  // Gate and up of an even number of rows, so that no word of hidden values is two tasks'.
  const int64_t chunk = 32, chunks = (I + chunk - 1) / chunk;
  parallel_for(threads, num_used * chunks, [&](int64_t task) {
    const Share& of = used[task / chunks];
    const int64_t row = task % chunks * chunk, rows = I - row < chunk ? I - row : chunk;
    const GateUp w = gate_up.from(id_of(task / chunks), 2 * I);
    const In by{w};
    float* gate = scratch<1>(2 * chunk * (PANEL + by.room()) + 2 * PANEL);
    float *up = gate + (chunk + 1) * PANEL, *room = up + (chunk + 1) * PANEL;
    const auto of_gate = by.rows(row, rows, room), of_up = by.rows(I + row, rows, room + chunk * by.room());
    for (int64_t p = of.panel; p < of.panel + panels_of(of.count); p++)
      in_panel(p, [&](int64_t, int64_t n) {
        const float* in = x_panels + p * PANEL * words;
        float* out = hidden + p * PANEL * inner;
        by.product(of_gate, rows, in, vectors_of(n), gate);
        by.product(of_up, rows, in, vectors_of(n), up);
        auto at = [&](int64_t r, int64_t t) {
          if (r >= rows) return Vec{};  // the second half of an odd width's last word
          Vec g = rounded<T>(load(gate + r * PANEL + t)), u = rounded<T>(load(up + r * PANEL + t));
          return silu(g) * u;
        };
        for (int64_t r = 0; r < rows; r += 2)
          for (int64_t t = 0; t < vectors_of(n) * LANES; t += LANES) {
            if (!PAIR && r + 1 == rows)
              store(out + (row + r) * PANEL + t, rounded<T>(at(r, t)));
            else
              store_hidden<T, PAIR>(out + t, row + r, at(r, t), at(r + 1, t));
          }
      });
  });
  parallel_for(threads, panels, [&](int64_t p) {
    in_panel(p, [&](int64_t, int64_t n) { Out{down}.round(hidden + p * PANEL * inner, vectors_of(n)); });
  });

  // A chunk of the result's rows over all experts: a token's sum runs in the order of its ids.
  const int64_t out_chunk = D / 32 < 2 * threads ? 16 : 32, out_chunks = (D + out_chunk - 1) / out_chunk;
  parallel_for(threads, out_chunks, [&](int64_t task) {
    const int64_t row = task * out_chunk, rows = D - row < out_chunk ? D - row : out_chunk;
    float* products = scratch<1>(pairs * out_chunk + out_chunk * (PANEL + Out{down}.room()) + 4 * PANEL);
    float *turned = products + pairs * out_chunk, *room = turned + out_chunk * PANEL;
    for (int64_t u = 0; u < num_used; u++) {
      const Down w = down.from(id_of(u), D);
      const Out by{w};
      const auto of_task = by.rows(row, rows, room);
      for (int64_t p = used[u].panel; p < used[u].panel + panels_of(used[u].count); p++)
        in_panel(p, [&](int64_t first, int64_t n) {
          by.product(of_task, rows, hidden + p * PANEL * inner, vectors_of(n), turned);
          transpose(turned, PANEL, rows, n, products + first * out_chunk, out_chunk);
        });
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
}

}  // namespace

// False if an id is none of the experts'. gate_up_segments 0: weights are in the model's dtype, and there are no types
// and rows. rounds: whether activations are rounded to 8 bits. many: in panels.
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
    int many,
    const void* residual,
    int64_t residual_stride,
    void* y,
    int64_t tokens,
    int64_t k,
    int64_t E,
    int64_t D,
    int64_t I,
    int threads) {
  for (int64_t p = 0; p < tokens * k; p++)
    if (ids[p] < 0 || ids[p] >= E) return false;
  const int64_t at_once = !many ? tokens : PAIRS_AT_ONCE / k < 1 ? 1 : PAIRS_AT_ONCE / k;
  auto run = [&]<class T, class GateUp, class Down>(T, const GateUp& in, const Down& out) {
    for (int64_t t = 0; t < tokens; t += at_once)
      (many ? experts_of_many<T, GateUp, Down> : experts_of_few<T, GateUp, Down>)(
          (const T*)x + t * x_stride, x_stride, weights + t * k, ids + t * k, in, out,
          residual ? (const T*)residual + t * residual_stride : nullptr, residual_stride, (T*)y + t * D,
          tokens - t < at_once ? tokens - t : at_once, k, E, D, I, threads);
  };
  if (gate_up_segments) {
    const BlockMatrix in{(const uint8_t*)gate_up, D, gate_up_segments, gate_up_types, gate_up_rows};
    const BlockMatrix out{(const uint8_t*)down, I, down_segments, down_types, down_rows};
    auto both = [&](const auto& a, const auto& b) { dtype == FLOAT32 ? run(float{}, a, b) : run(bf16{}, a, b); };
    rounds ? both(RoundedMatrix{in}, RoundedMatrix{out}) : both(in, out);
  } else if (dtype == FLOAT32) {
    run(float{}, PlainMatrix<float>{(const float*)gate_up, D}, PlainMatrix<float>{(const float*)down, I});
  } else {
    run(bf16{}, PlainMatrix<bf16>{(const bf16*)gate_up, D}, PlainMatrix<bf16>{(const bf16*)down, I});
  }
  return true;
}

THALWEG_RECORDABLE(experts)
