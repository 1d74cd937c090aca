// Products of rows of GGML's blocks. Elements are widened in registers on their way to a product, as exactly as
// quant/ggml_blocks.py gives them in float32, and used for all tokens of a tile.
#include "blocks.h"
#include "formats.h"

namespace thalweg {
namespace {

// LANES bytes as integers. GCC makes poor code of such a conversion by itself.
inline IVec bytes_at(const uint8_t* p) {
#if defined(__AVX512F__)
  return (IVec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  uint8_t b __attribute__((vector_size(LANES)));
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, IVec);
#endif
}

inline IVec signed_bytes_at(const uint8_t* p) {
#if defined(__AVX512F__)
  return (IVec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (IVec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  int8_t b __attribute__((vector_size(LANES)));
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, IVec);
#endif
}

inline Vec widened(IVec v) { return __builtin_convertvector(v, Vec); }

// Of each type: elements and bytes of a block, and each(block, f), which calls f(k, Vec) for its elements k and on.

struct Q8_0 {
  static constexpr int ELEMENTS = 32, BYTES = 34;
  template <class F>
  __attribute__((always_inline)) static inline void each(const uint8_t* b, F&& f) {
    Vec d = splat(half_at(b));
#pragma GCC unroll 8
    for (int k = 0; k < 32; k += LANES) f(k, widened(signed_bytes_at(b + 2 + k)) * d);
  }
};

struct Q4_0 {
  static constexpr int ELEMENTS = 32, BYTES = 18;
  template <class F>
  __attribute__((always_inline)) static inline void each(const uint8_t* b, F&& f) {
    Vec d = splat(half_at(b));
#pragma GCC unroll 8
    for (int k = 0; k < 32; k += LANES) {
      IVec q = bytes_at(b + 2 + k % 16);
      f(k, (widened(k < 16 ? q & 15 : q >> 4) - 8.f) * d);
    }
  }
};

struct Q5_0 {
  static constexpr int ELEMENTS = 32, BYTES = 22;
  template <class F>
  __attribute__((always_inline)) static inline void each(const uint8_t* b, F&& f) {
    Vec d = splat(half_at(b));
    uint32_t bits;
    memcpy(&bits, b + 2, 4);
    UVec lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
#pragma GCC unroll 8
    for (int k = 0; k < 32; k += LANES) {
      IVec q = bytes_at(b + 6 + k % 16);
      IVec fifth = (IVec)((((UVec{} + (bits >> k)) >> lane) & 1) << 4);
      f(k, (widened((k < 16 ? q & 15 : q >> 4) | fifth) - 16.f) * d);
    }
  }
};

// d * scale * q - dmin * min of eight sub-blocks of 32; quants(j, e) gives those of sub-block j from element e.
template <class Q, class F>
__attribute__((always_inline)) inline void affine(const uint8_t* b, Q&& quants, F&& f) {
  float d = half_at(b), dmin = half_at(b + 2);
  const SixBits bits(b + 4);
#pragma GCC unroll LANES / 2
  for (int j = 0; j < 8; j++) {
    Vec times = splat(d * (int)(bits.scales >> (8 * j) & 63)), less = splat(dmin * (int)(bits.minima >> (8 * j) & 63));
#pragma GCC unroll 8
    for (int e = 0; e < 32; e += LANES) f(32 * j + e, widened(quants(j, e)) * times - less);
  }
}

struct Q4_K {
  static constexpr int ELEMENTS = 256, BYTES = 144;
  template <class F>
  __attribute__((always_inline)) static inline void each(const uint8_t* b, F&& f) {
    affine(
        b,
        [&](int j, int e) __attribute__((always_inline)) {
          IVec q = bytes_at(b + 16 + j / 2 * 32 + e);
          return j % 2 ? q >> 4 : q & 15;
        },
        f);
  }
};

struct Q5_K {
  static constexpr int ELEMENTS = 256, BYTES = 176;
  template <class F>
  __attribute__((always_inline)) static inline void each(const uint8_t* b, F&& f) {
    affine(
        b,
        [&](int j, int e) __attribute__((always_inline)) {
          IVec q = bytes_at(b + 48 + j / 2 * 32 + e), fifth = (bytes_at(b + 16 + e) >> j) & 1;
          return (j % 2 ? q >> 4 : q & 15) | fifth << 4;
        },
        f);
  }
};

struct Q6_K {
  static constexpr int ELEMENTS = 256, BYTES = 210;
  template <class F>
  __attribute__((always_inline)) static inline void each(const uint8_t* b, F&& f) {
    float d = half_at(b + 208);
    const int8_t* scales = (const int8_t*)b + 192;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
#pragma GCC unroll 8
        for (int e = 0; e < 32; e += LANES) {
          IVec low = bytes_at(b + half * 64 + j % 2 * 32 + e), high = bytes_at(b + 128 + half * 32 + e);
          IVec q = (j < 2 ? low & 15 : low >> 4) | ((high >> (2 * j)) & 3) << 4;
          int k = half * 128 + j * 32 + e;
          f(k, (widened(q) - 32.f) * (d * scales[k / 16]));
        }
  }
};

// R rows times one token.
template <class Q, int R>
inline void dots(const uint8_t* w, int64_t row_bytes, const float* x, float* out) {
  Vec acc[R] = {};
  for (int64_t i = 0; i < row_bytes / Q::BYTES; i++) {
    const float* xi = x + i * Q::ELEMENTS;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const uint8_t* block = w + r * row_bytes + i * Q::BYTES;
      for (int line = 0; line < Q::BYTES; line += 64) __builtin_prefetch(block + R * row_bytes + line);
      Q::each(block, [&](int k, Vec v) __attribute__((always_inline)) { acc[r] += v * load(xi + k); });
    }
  }
  float sums[4];
  sum4(acc[0], acc[R > 1 ? 1 : 0], acc[R > 2 ? 2 : 0], acc[R > 3 ? 3 : 0], sums);
  for (int r = 0; r < R; r++) out[r] = sums[r];
}

template <class Q>
void widen_blocks(Q, const uint8_t* w, int64_t blocks, float* out) {
  for (int64_t i = 0; i < blocks; i++) {
    float* to = out + i * Q::ELEMENTS;
    Q::each(w + i * Q::BYTES, [&](int k, Vec v) __attribute__((always_inline)) { store(to + k, v); });
  }
}

template <class Q>
void rows_of_blocks(
    Q type,
    const uint8_t* w,
    int64_t rows,
    int64_t row_bytes,
    const float* x,
    int64_t x_stride,
    int64_t tokens,
    float* out,
    int64_t out_stride) {
  int64_t r = 0;
  if (tokens == 1) {
    for (; r + 4 <= rows; r += 4) dots<Q, 4>(w + r * row_bytes, row_bytes, x, out + r);
    for (; r < rows; r++) dots<Q, 1>(w + r * row_bytes, row_bytes, x, out + r);
    return;
  }
  // For several tokens rows are widened first, as many as stay near.
  const int64_t columns = row_bytes / Q::BYTES * Q::ELEMENTS, most = rows_of_task(4 * columns);
  float* wide = scratch<4>(most * columns);
  for (; r < rows; r += most) {
    int64_t count = rows - r < most ? rows - r : most;
    widen_blocks(type, w + r * row_bytes, count * (row_bytes / Q::BYTES), wide);
    rows_times(wide, count, columns, x, x_stride, tokens, out + r, out_stride);
  }
}

// Rows of numbers, which are no blocks.
template <class T>
struct Numbers {
  static constexpr int ELEMENTS = 1, BYTES = sizeof(T);
};

template <class T>
void rows_of_blocks(
    Numbers<T>, const uint8_t* w, int64_t rows, int64_t row_bytes, const float* x, int64_t x_stride, int64_t tokens, float* out,
    int64_t out_stride) {
  rows_times((const T*)w, rows, row_bytes / sizeof(T), x, x_stride, tokens, out, out_stride);
}

template <class T>
void widen_blocks(Numbers<T>, const uint8_t* w, int64_t count, float* out) {
  in_lanes(count, [&](int64_t k, int64_t n) { store(out + k, load((const T*)w + k, n), n); });
}

// f(Q) of the type that has this number.
template <class F>
inline void of_type(int32_t type, F&& f) {
  switch (type) {
    case 0:
      return f(Numbers<float>{});
    case 1:
      return f(Numbers<half>{});
    case 30:
      return f(Numbers<bf16>{});
    case 2:
      return f(Q4_0{});
    case 6:
      return f(Q5_0{});
    case 8:
      return f(Q8_0{});
    case 12:
      return f(Q4_K{});
    case 13:
      return f(Q5_K{});
    case 14:
      return f(Q6_K{});
  }
  abort();
}

}  // namespace

int64_t bytes_of_row(int32_t type, int64_t columns) {
  int64_t bytes = 0;
  of_type(type, [&](auto q) { bytes = columns / q.ELEMENTS * q.BYTES; });
  return bytes;
}

int64_t BlockMatrix::bytes() const {
  int64_t total = 0;
  for (int i = 0; i < segments; i++) total += rows[i] * bytes_of_row(types[i], columns);
  return total;
}

int64_t BlockMatrix::row_bytes() const {
  int64_t all = 0;
  for (int i = 0; i < segments; i++) all += rows[i];
  return bytes() / all;
}

void BlockMatrix::times(
    int64_t first, int64_t count, const float* x, int64_t x_stride, int64_t tokens, float* out, int64_t out_stride) const {
  in_segments(first, count, [&](int32_t type, const uint8_t* w, int64_t rows, int64_t at) {
    of_type(type, [&](auto q) {
      rows_of_blocks(
          q, w, rows, bytes_of_row(type, columns), x, x_stride, tokens, out + at, out_stride);
    });
  });
}

void BlockMatrix::widen(int64_t first, int64_t count, float* out) const {
  in_segments(first, count, [&](int32_t type, const uint8_t* w, int64_t rows, int64_t at) {
    of_type(type, [&](auto q) { widen_blocks(q, w, rows * (columns / q.ELEMENTS), out + at * columns); });
  });
}

}  // namespace thalweg
