// Op "mla_mixer_decode": absorbed attention of one new token of each sequence over its latents, with all that lies
// between the input and the output projection.
//
// A task is some heads of a sequence, which read a tile of tokens together and keep running sums: a softmax needs no
// second pass. Heads of a task and tokens of a tile are fixed, so the number of threads changes no bit.
#include <limits>

#include "rows.h"

using namespace thalweg;

namespace {

constexpr int64_t TILE = 16;  // tokens
constexpr int64_t HEADS = 4;  // of a task

struct Shape {
  int64_t B, H, K, V, R, P, S;  // S: tokens in a block
};

// The new token's latent through its norm, and its shared key as it is, into row `row` of the blocks.
template <class T, class N>
void write_latent(const T* latent, const N* norm, float eps, const Shape& s, T* row) {
  float* wide = scratch<2>(padded(s.R));
  widen(latent, 0, norm, eps, 1, s.R, wide);
  in_lanes(s.R, [&](int64_t i, int64_t n) { store(row + i, load(wide + i), n); });
  memcpy(row + s.R, latent + s.R, s.P * sizeof(T));
}

template <class T>
void attend(
    const T* q,  // [HEADS, K + P]
    int64_t heads,
    const T* w_uk,
    const T* w_uv,
    int64_t head_stride,
    const T* blocks,
    const int32_t* table,
    int64_t length,
    float scale,
    const Shape& s,
    T* out) {
  const int64_t C = s.R + s.P, width = padded(C), wide_R = padded(s.R);
  float* room = scratch<1>(HEADS * (width + wide_R) + TILE * width + TILE * HEADS);
  float *latent_q = room, *sums = latent_q + HEADS * width, *tile = sums + HEADS * wide_R, *scores = tile + TILE * width;
  memset(room, 0, 4 * HEADS * (width + wide_R));
  float most[HEADS], total[HEADS];
  for (int64_t h = 0; h < heads; h++) {
    const T* of_head = q + h * (s.K + s.P);
    float* to = latent_q + h * width;
    for (int64_t k = 0; k < s.K; k++) {
      const T* row = w_uk + h * head_stride + k * s.R;
      Vec factor = splat(to_float(of_head[k]) * scale);
      in_lanes(s.R, [&](int64_t i, int64_t n) { store(to + i, load(to + i, n) + load(row + i, n) * factor, n); });
    }
    for (int64_t p = 0; p < s.P; p++) to[s.R + p] = to_float(of_head[s.K + p]) * scale;
    most[h] = -std::numeric_limits<float>::infinity(), total[h] = 0;
  }
  for (int64_t first = 0; first < length; first += TILE) {
    int64_t count = length - first < TILE ? length - first : TILE;
    for (int64_t t = 0; t < count; t++) {
      int64_t at = first + t;
      widen(blocks + (table[at / s.S] * s.S + at % s.S) * C, 0, (const T*)nullptr, 0.f, 1, C, tile + t * width);
    }
    rows_times(tile, count, width, latent_q, width, heads, scores, TILE);
    for (int64_t h = 0; h < heads; h++) {
      float* p = scores + h * TILE;
      float top = most[h];
      for (int64_t t = 0; t < count; t++) top = p[t] > top ? p[t] : top;
      float keep = std::exp(most[h] - top);
      most[h] = top;
      for (int64_t t = count; t < TILE; t++) p[t] = -std::numeric_limits<float>::infinity();
      for (int64_t t = 0; t < TILE; t += LANES) store(p + t, exp(load(p + t) - top));
      total[h] *= keep;
      for (int64_t t = 0; t < count; t++) total[h] += p[t];
      float* to = sums + h * wide_R;
      for (int64_t i = 0; i < wide_R; i += LANES) {
        Vec sum = load(to + i) * keep;
        for (int64_t t = 0; t < count; t++) sum += load(tile + t * width + i) * p[t];
        store(to + i, sum);
      }
    }
  }
  float* values = scratch<2>(s.V);
  for (int64_t h = 0; h < heads; h++) {
    float inverse = total[h] > 0 ? 1.f / total[h] : total[h] != total[h] ? total[h] : 0.f;
    for (int64_t i = 0; i < wide_R; i += LANES) store(sums + h * wide_R + i, load(sums + h * wide_R + i) * inverse);
    for (int64_t i = s.R; i < wide_R; i++) sums[h * wide_R + i] = 0;  // of the shared keys, in a tile's same vector
    rows_times(w_uv + h * head_stride, s.V, s.R, sums + h * wide_R, wide_R, 1, values, s.V);
    in_lanes(s.V, [&](int64_t v, int64_t n) { store(out + h * s.V + v, load(values + v, n), n); });
  }
}

template <class T, class N>
void mla_mixer(
    const T* proj,
    int64_t proj_stride,
    const N* norm,
    const T* w_uk,
    const T* w_uv,
    int64_t head_stride,
    T* blocks,
    const int32_t* tables,
    int64_t table_stride,
    const int32_t* lengths,
    const int64_t* block_rows,
    float scale,
    float eps,
    T* out,
    const Shape& s,
    int threads) {
  const int64_t queries = s.H * (s.K + s.P), C = s.R + s.P, parts = (s.H + HEADS - 1) / HEADS;
  int64_t tokens = 0;
  for (int64_t b = 0; b < s.B; b++) {
    write_latent(proj + b * proj_stride + queries, norm, eps, s, blocks + block_rows[b] * C);
    tokens += lengths[b];
  }
  int64_t bytes = sizeof(T) * (tokens * C * parts + s.B * s.H * (s.K + s.V) * s.R);
  parallel_for(worth(threads, bytes), s.B * parts, [&](int64_t task) {
    int64_t b = task / parts, h = task % parts * HEADS, heads = s.H - h < HEADS ? s.H - h : HEADS;
    attend(
        proj + b * proj_stride + h * (s.K + s.P), heads, w_uk + h * head_stride, w_uv + h * head_stride, head_stride,
        blocks, tables + b * table_stride, lengths[b], scale, s, out + (b * s.H + h) * s.V);
  });
}

}  // namespace

extern "C" void thalweg_mla_mixer(
    int dtype,
    const void* proj,
    int64_t proj_stride,
    int norm_dtype,
    const void* norm,
    const void* w_uk,
    const void* w_uv,
    int64_t head_stride,
    void* blocks,
    const int32_t* tables,
    int64_t table_stride,
    const int32_t* lengths,
    const int64_t* block_rows,
    float scale,
    float eps,
    void* out,
    int64_t B,
    int64_t H,
    int64_t K,
    int64_t V,
    int64_t R,
    int64_t P,
    int64_t S,
    int threads) {
  Shape s{B, H, K, V, R, P, S};
  auto run = [&](auto t, auto n) {
    using T = decltype(t);
    using N = decltype(n);
    mla_mixer<T, N>(
        (const T*)proj, proj_stride, (const N*)norm, (const T*)w_uk, (const T*)w_uv, head_stride, (T*)blocks, tables,
        table_stride, lengths, block_rows, scale, eps, (T*)out, s, threads);
  };
  if (dtype == FLOAT32)
    run(float{}, float{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}
