// Products of rows of GGML's blocks with a few tokens' rounded activations, and the rounding.
#include "int8.h"

#include "int8_types.h"

namespace thalweg {
namespace {

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

  IVec operator()(Vec v) const {
    const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    return (IVec)(v * inverse + magic) - (IVec)magic;
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

void round32(const float* x, Rounded32& to) {
  Rounding rounding(x, 32);
  IVec sums = {};
  for (int k = 0; k < 32; k += LANES) {
    IVec q = rounding(load(x + k));
    put_bytes(to.q + k, q);
    sums += q;
  }
  to.d = rounding.d;
  to.sum = total(sums);
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

// The same of a block of 32.
template <class Q, int N>
inline void add_32(const uint8_t* b, const uint8_t* x, int64_t stride, F8* acc) {
  const float d = half_at(b);
  B32 q = Q::quants(b);
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
    const Rounded32* token = (const Rounded32*)(x + n * stride);
    B32 s;
    memcpy(&s, token->q, 32);
    I8 dot = {};
    if constexpr (Q::OFFSET == 128 && !LARGE_DOTS) {
      dot = signed_dots(q ^ 128, s);
    } else {
      dot[0] = -Q::OFFSET * token->sum;
      dot = add_dots(dot, q, s);
    }
    acc[n] += __builtin_convertvector(dot, F8) * (d * token->d);
  }
}

template <class Q, int N>
void rows_of(const uint8_t* w, int64_t rows, int64_t blocks, const uint8_t* x, int64_t stride, float* out, int64_t out_stride) {
  constexpr bool WIDE = Q::ELEMENTS == 256;
  constexpr int64_t STEP = WIDE ? sizeof(Rounded256) : sizeof(Rounded32);
  for (int64_t r = 0; r < rows; r++) {
    std::conditional_t<WIDE, Vec, F8> acc[N] = {};
    for (int64_t i = 0; i < blocks; i++, w += Q::BYTES) {
      for (int line = 0; line < Q::BYTES; line += 64) __builtin_prefetch(w + AHEAD / 4 + line);
      if constexpr (WIDE)
        add_256<Q, N>(w, x + i * STEP, stride, acc);
      else
        add_32<Q, N>(w, x + i * STEP, stride, acc);
    }
    for (int n = 0; n < N; n++) {
      if constexpr (WIDE)
        out[n * out_stride + r] = sum(acc[n]);
      else
        out[n * out_stride + r] = sum8(acc[n]);
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
    for (int64_t k = 0; k < columns / 32; k++) round32(from + 32 * k, ((Rounded32*)row)[k]);
  Rounded256* wide = (Rounded256*)((char*)row + bytes_of_32(columns));
  if (large)
    for (int64_t k = 0; k < columns / 256; k++) round256(from + 256 * k, wide[k]);
}

void RoundedMatrix::times(
    int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride) const {
  in_segments(first, count, [&](int32_t type, const uint8_t* w, int64_t rows, int64_t at) {
    of_type(type, [&](auto q) {
      using Q = decltype(q);
      const int64_t stride = 4 * x_stride, blocks = columns / Q::ELEMENTS;
      const uint8_t* row = (const uint8_t*)x + (Q::ELEMENTS == 256 ? bytes_of_32(columns) : 0);
      int64_t t = 0;
      auto some = [&](auto n) {
        for (; t + n <= tokens; t += n)
          rows_of<Q, n>(w, rows, blocks, row + t * stride, stride, out + at + t * out_stride, out_stride);
      };
      some(std::integral_constant<int, 4>{});
      some(std::integral_constant<int, 2>{});
      some(std::integral_constant<int, 1>{});
    });
  });
}

}  // namespace thalweg
