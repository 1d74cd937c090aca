// Products of rows of GGML's blocks with a few tokens' rounded activations, and the rounding.
#include "int8.h"

#include "int8_pairs.h"
#include "int8_types.h"

namespace thalweg {
namespace {

constexpr int64_t NEAR = 4 << 10;  // bytes ahead that are prefetched

// How an element of a row that is rounded in blocks of n becomes an integer; NaN and infinity make d NaN.
struct Rounding {
  float d;
  Vec inverse;

  Rounding(const float* x, int n) {
    Vec most = {}, off = {};
    for (int k = 0; k < n; k += LANES) {
      Vec v = load(x + k), size = v < 0.f ? -v : v;
      most = larger(size, most);
      off += v - v;
    }
    float top = largest(most);
    inverse = splat(top > 0.f ? 127.f / top : 0.f);
    d = top / 127.f + sum(off);
  }

  // The lowest byte and its sign. It is no step where v or `inverse` is not finite, but sums of it cannot overflow.
  IVec operator()(Vec v) const {
    const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    return (IVec)(v * inverse + magic) << 24 >> 24;
  }
};

void put_bytes(int8_t* to, IVec v) {
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  Bytes b = __builtin_convertvector(v, Bytes);
  memcpy(to, &b, sizeof b);
}

int32_t total(IVec v) {
  int32_t all = 0;
  for (int i = 0; i < LANES; i++) all += v[i];
  return all;
}

void round32(const float* x, int64_t b, const Rounded32& to) {
  Rounding rounding(x + 32 * b, 32);
  IVec sums = {};
  for (int64_t k = 32 * b; k < 32 * b + 32; k += LANES) {
    IVec q = rounding(load(x + k));
    put_bytes((int8_t*)to.q() + k, q);
    sums += q;
  }
  ((float*)to.d())[b] = rounding.d;
  ((int32_t*)to.sums())[b] = total(sums);
}

void round256(const float* x, Rounded256& to) {
  Rounding rounding(x, 256);
  for (int s = 0; s < 16; s++) {
    IVec sums = {};
    for (int k = 16 * s; k < 16 * s + 16; k += LANES) {
      IVec q = rounding(load(x + k));
      put_bytes(to.q + k, q);
      sums += q;
    }
    to.sums[s] = total(sums);
  }
  to.d = rounding.d;
  for (int j = 0; j < 16; j++) to.part[j] = j < 8 ? to.d * (to.sums[2 * j] + to.sums[2 * j + 1]) : 0.f;
}

// Adds the products of a block of 256 with N tokens, whose rows lie `stride` bytes apart.
template <class Q, int N>
inline void add_256(const uint8_t* b, const uint8_t* x, int64_t stride, Vec* acc) {
  auto token = [&](int n) { return (const Rounded256*)(x + n * stride); };
  const float d = half_at(b + Q::D);
  IVec dot[N] = {};
  auto add = [&](const auto& scales) {
    unrolled<256 / WIDTH>([&](auto c) {
      QVec q = Q::template quants<c>(b);
      SVec weights = scales.template of<c>();
#pragma GCC unroll 8
      for (int n = 0; n < N; n++)
        dot[n] = add_products(dot[n], pair_products(q, bytes_at(token(n)->q + c * WIDTH)), weights);
    });
  };
  if constexpr (Q::OFFSET) {
    const Scales<16> scales(b + 192);
    add(scales);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) dot[n] -= Q::OFFSET * scales.times(token(n)->sums);
  } else {
    const SixBits bits(b + 4);
    add(Scales<32>(bits.scales));
    const float dmin = half_at(b + 2);
#pragma GCC unroll 2
    for (int j = 0; j < 8; j += LANES) {
      Vec minima = of_bytes(bits.minima >> (8 * j)) * dmin;
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[n] -= minima * load(token(n)->part + j);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) acc[n] += __builtin_convertvector(dot[n], Vec) * (d * token(n)->d);
}

// The same of block i of 32 in a row.
template <class Q, int N>
inline void add_32(const uint8_t* b, Rounded32 x, int64_t i, int64_t stride, F8* acc) {
  const float d = half_at(b);
  B32 q = Q::quants(b);
#pragma GCC unroll 8
  for (int n = 0; n < N; n++, x.at += stride) {
    B32 s;
    memcpy(&s, x.q() + 32 * i, 32);
    I8 dot = {};
    if constexpr (Q::OFFSET == 128 && !LARGE_DOTS) {
      dot = signed_dots(q ^ 128, s);
    } else {
      dot = add_dots(I8{} - Q::OFFSET / 8 * x.sums()[i], q, s);
    }
    acc[n] += __builtin_convertvector(dot, F8) * (d * x.d()[i]);
  }
}

template <class Q, int N>
inline void row_of_256(const uint8_t* w, int64_t blocks, const uint8_t* x, int64_t stride, Vec* out) {
  Vec acc[N] = {};
  for (int64_t i = 0; i < blocks; i++, w += Q::BYTES) {
    for (int line = 0; line < Q::BYTES; line += 64) __builtin_prefetch(w + NEAR + line);
    add_256<Q, N>(w, x + i * sizeof(Rounded256), stride, acc);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) out[n] = acc[n];
}

template <class Q, int N>
inline void row_of_32(const uint8_t* w, Rounded32 x, int64_t stride, Vec* out) {
  const int64_t blocks = x.columns / 32;
  int64_t i = 0;
  Vec acc[N] = {};
#if defined(__AVX512VNNI__)
  const std::integral_constant<int64_t, 16> sixteen{};
  for (; i + sixteen <= blocks; i += sixteen, w += sixteen * Q::BYTES)
    add_pairs<Q, N>(w, sixteen, x, i, stride, NEAR, acc);
  if (const int64_t rest = (blocks - i) / 2 * 2) {
    add_pairs<Q, N>(w, rest, x, i, stride, NEAR, acc);
    i += rest, w += rest * Q::BYTES;
  }
#endif
  if (i < blocks) {
    F8 rest[N] = {};
    for (; i < blocks; i++, w += Q::BYTES) {
      __builtin_prefetch(w + NEAR);
      add_32<Q, N>(w, x, i, stride, rest);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[n] += folded(rest[n]);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) out[n] = acc[n];
}

template <class Q, int N>
void rows_of(
    const uint8_t* w, int64_t rows, int64_t columns, const uint8_t* x, int64_t stride, float* out, int64_t out_stride) {
  const int64_t blocks = columns / Q::ELEMENTS;
  for (int64_t first = 0; first < rows; first += 4) {
    const int some = rows - first < 4 ? rows - first : 4;
    Vec acc[4][N];
    for (int r = some; r < 4; r++)
      for (int n = 0; n < N; n++) acc[r][n] = Vec{};
    for (int r = 0; r < some; r++, w += blocks * Q::BYTES) {
      if constexpr (Q::ELEMENTS == 256)
        row_of_256<Q, N>(w, blocks, x + Rounded32::bytes(columns), stride, acc[r]);
      else
        row_of_32<Q, N>(w, {x, columns}, stride, acc[r]);
    }
    for (int n = 0; n < N; n++) {
      float sums[4];
      sum4(acc[0][n], acc[1][n], acc[2][n], acc[3][n], sums);
      memcpy(out + n * out_stride + first, sums, some * sizeof(float));
    }
  }
}

}  // namespace

void RoundedMatrix::round(float* row) const {
  float* from = scratch<5>(columns);
  memcpy(from, row, 4 * columns);
  bool small = false, large = false;
  for (int i = 0; i < segments; i++)
    of_type(types[i], [&](auto q) { (q.ELEMENTS == 256 ? large : small) = true; });
  if (small)
    for (int64_t b = 0; b < columns / 32; b++) round32(from, b, {(const uint8_t*)row, columns});
  Rounded256* wide = (Rounded256*)((uint8_t*)row + Rounded32::bytes(columns));
  if (large)
    for (int64_t k = 0; k < columns / 256; k++) round256(from + 256 * k, wide[k]);
}

void RoundedMatrix::times(
    int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride) const {
  in_segments(first, count, [&](int32_t type, const uint8_t* w, int64_t rows, int64_t at) {
    of_type(type, [&](auto q) {
      using Q = decltype(q);
      const int64_t stride = 4 * x_stride;
      const uint8_t* row = (const uint8_t*)x;
      int64_t t = 0;
      auto some = [&](auto n) {
        for (; t + n <= tokens; t += n)
          rows_of<Q, n>(w, rows, columns, row + t * stride, stride, out + at + t * out_stride, out_stride);
      };
      some(std::integral_constant<int, 4>{});
      some(std::integral_constant<int, 2>{});
      some(std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace thalweg
