// Ops "mla_mixer_decode" and "mla_decode": absorbed attention of one new token of each sequence over its latents, with
// all that lies between the projection of its queries and the output projection.
//
// A task is some heads of a sequence, which read a tile of tokens together.
#include "attend.h"
#include "recording.h"

using namespace thalweg;

namespace {

constexpr int64_t HEADS = 4;  // of a task

struct Shape {
  int64_t B, H, K, V, R, P, S;  // S: tokens in a block
};

// The shared part of a head's queries is turned by positions, unless there are none.
struct Rotation {
  const int64_t* positions;
  const float* frequencies;
  float scale;
};

// The new token's latent through its norm, and its shared key as it is, into row `row` of the blocks.
template <class T, class N>
void write_latent(const T* latent, const N* norm, float eps, const Shape& s, T* row) {
  float* wide = scratch<2>(padded(s.R));
  widen(latent, 0, norm, eps, 1, s.R, wide);
  in_lanes(s.R, [&](int64_t i, int64_t n) { store(row + i, load(wide + i), n); });
  memcpy(row + s.R, latent + s.R, s.P * sizeof(T));
}

// The P shared values of a query, turned and rounded to T.
template <class T>
void shared_part(const T* q, const Shape& s, const Rotation& rotation, int64_t b, float* out) {
  for (int64_t p = 0; p < s.P; p++) out[p] = to_float(q[p]);
  if (!rotation.positions) return;
  int64_t pairs = s.P / 2;
  float *cosines = scratch<2>(2 * pairs), *sines = cosines + pairs;
  turns(rotation.positions[b], rotation.frequencies, pairs, rotation.scale, cosines, sines);
  for (int64_t i = 0; i < pairs; i++) {
    float even = out[2 * i], odd = out[2 * i + 1];
    T turned[2];
    put(turned, even * cosines[i] - odd * sines[i]);
    put(turned + 1, odd * cosines[i] + even * sines[i]);
    out[2 * i] = to_float(turned[0]), out[2 * i + 1] = to_float(turned[1]);
  }
}

template <class T>
void mixer_of_heads(
    const T* q,  // [heads, K + P]
    int64_t heads,
    const T* w_uk,
    const T* w_uv,
    int64_t head_stride,
    const T* blocks,
    const int32_t* table,
    int64_t length,
    float scale,
    const Shape& s,
    const Rotation& rotation,
    int64_t b,
    T* out) {
  const int64_t C = s.R + s.P, width = padded(C), wide_R = padded(s.R);
  float* latent_q = scratch<1>(HEADS * (width + wide_R) + TILE * width + s.V);
  float *sums = latent_q + HEADS * width, *tile = sums + HEADS * wide_R, *values = tile + TILE * width;
  memset(latent_q, 0, 4 * HEADS * width);
  for (int64_t h = 0; h < heads; h++) {
    const T* of_head = q + h * (s.K + s.P);
    float* to = latent_q + h * width;
    for (int64_t k = 0; k < s.K; k++) {
      const T* row = w_uk + h * head_stride + k * s.R;
      Vec factor = splat(to_float(of_head[k]));
      in_lanes(s.R, [&](int64_t i, int64_t n) { store(to + i, load(to + i, n) + load(row + i, n) * factor, n); });
    }
    shared_part(of_head + s.K, s, rotation, b, to + s.R);
    for (int64_t i = 0; i < width; i += LANES) store(to + i, load(to + i) * scale);
  }
  auto fill = [&](int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; t++) {
      int64_t at = first + t, row = table[at / s.S] * s.S + at % s.S;
      widen(blocks + row * C, 0, (const T*)nullptr, 0.f, 1, C, tile + t * width);
    }
  };
  attend(latent_q, heads, width, tile, tile, width, wide_R, length, fill, sums);
  for (int64_t h = 0; h < heads; h++) {
    for (int64_t i = s.R; i < wide_R; i++) sums[h * wide_R + i] = 0;  // of shared keys, which share a vector with R
    rows_times(w_uv + h * head_stride, s.V, s.R, sums + h * wide_R, wide_R, 1, values, s.V);
    in_lanes(s.V, [&](int64_t v, int64_t n) { store(out + h * s.V + v, load(values + v, n), n); });
  }
}

template <class T, class N>
void mla_decode(
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
    const Rotation& rotation,
    T* out,
    const Shape& s,
    int threads) {
  const int64_t queries = s.H * (s.K + s.P), C = s.R + s.P, parts = (s.H + HEADS - 1) / HEADS;
  int64_t tokens = 0;
  for (int64_t b = 0; b < s.B; b++) {
    if (norm) write_latent(proj + b * proj_stride + queries, norm, eps, s, blocks + block_rows[b] * C);
    tokens += lengths[b];
  }
  int64_t bytes = sizeof(T) * (tokens * C * parts + s.B * s.H * (s.K + s.V) * s.R);
  parallel_for(worth(threads, bytes), s.B * parts, [&](int64_t task) {
    int64_t b = task / parts, h = task % parts * HEADS, heads = s.H - h < HEADS ? s.H - h : HEADS;
    mixer_of_heads(
        proj + b * proj_stride + h * (s.K + s.P), heads, w_uk + h * head_stride, w_uv + h * head_stride, head_stride,
        blocks, tables + b * table_stride, lengths[b], scale, s, rotation, b, out + (b * s.H + h) * s.V);
  });
}

}  // namespace

// Without a norm latents are in the blocks already, and block_rows is not read.
extern "C" void thalweg_mla_decode(
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
    const int64_t* positions,
    const float* frequencies,
    float rope_scale,
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
  Rotation rotation{positions, frequencies, rope_scale};
  auto run = [&](auto t, auto n) {
    using T = decltype(t);
    using N = decltype(n);
    mla_decode<T, N>(
        (const T*)proj, proj_stride, (const N*)norm, (const T*)w_uk, (const T*)w_uv, head_stride, (T*)blocks, tables,
        table_stride, lengths, block_rows, scale, eps, rotation, (T*)out, s, threads);
  };
  if (dtype == FLOAT32)
    run(float{}, float{});
  else
    norm_dtype == FLOAT32 ? run(bf16{}, float{}) : run(bf16{}, bf16{});
}

THALWEG_RECORDABLE(mla_decode)
