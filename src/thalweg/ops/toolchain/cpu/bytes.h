// Vectors of bytes, as wide as those of floats, and their products with integer sums.
#pragma once

#include <utility>

#include "formats.h"

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define THALWEG_DOT4 1  // there is an instruction that adds four products of bytes to an integer
#endif

namespace thalweg {

constexpr int WIDTH = 4 * LANES;  // bytes of a vector
typedef uint64_t QVec __attribute__((vector_size(WIDTH)));
typedef int16_t SVec __attribute__((vector_size(WIDTH)));
typedef uint8_t B32 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef float F8 __attribute__((vector_size(32)));

template <class F, int... I>
__attribute__((always_inline)) inline void each_of(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), f(1) .. as constants that templates take.
template <int N, class F>
__attribute__((always_inline)) inline void unrolled(F&& f) {
  each_of(std::make_integer_sequence<int, N>{}, f);
}

inline QVec bytes_at(const void* p) {
  QVec v;
  memcpy(&v, p, sizeof v);
  return v;
}

// 32 bytes twice, if a vector has 64; else a vector's bytes.
inline QVec twice_at(const uint8_t* p) {
#if defined(__AVX512F__)
  return (QVec)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p));
#else
  return bytes_at(p);
#endif
}

// Shifted left, or right by less than zero: the second half of 64 bytes by another count. Bits pass from byte to byte.
template <int FIRST, int SECOND>
inline QVec shifted(QVec v) {
#if defined(__AVX512F__)
  constexpr uint64_t a = FIRST < 0 ? -FIRST : FIRST, b = SECOND < 0 ? -SECOND : SECOND;
  static_assert(FIRST == 0 || SECOND == 0 || (FIRST < 0) == (SECOND < 0));
  constexpr QVec counts = {a, a, a, a, b, b, b, b};
  return FIRST < 0 || SECOND < 0 ? v >> counts : v << counts;
#else
  return FIRST < 0 ? v >> -FIRST : v << (FIRST < 0 ? 0 : FIRST);
#endif
}

// Up to eight bytes as floats, and zeros behind them.
inline Vec of_bytes(uint64_t bytes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_cvtsi64_si128(bytes)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes)));
#else
  Vec v;
  for (int i = 0; i < LANES; i++) v[i] = bytes >> (8 * i) & 255;
  return v;
#endif
}

constexpr uint64_t every(uint8_t byte) { return 0x0101010101010101u * byte; }

// Sums of two neighbours' products, u being unsigned and s signed; |sums| have to be less than 2^15.
inline SVec pair_products(QVec u, QVec s) {
#if defined(__AVX512F__)
  return (SVec)_mm512_maddubs_epi16((__m512i)u, (__m512i)s);
#elif defined(__AVX2__)
  return (SVec)_mm256_maddubs_epi16((__m256i)u, (__m256i)s);
#else
  uint8_t a[WIDTH];
  int8_t b[WIDTH];
  memcpy(a, &u, WIDTH), memcpy(b, &s, WIDTH);
  int16_t out[WIDTH / 2];
  for (int i = 0; i < WIDTH / 2; i++) out[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  SVec v;
  memcpy(&v, out, WIDTH);
  return v;
#endif
}

// acc plus the sums of two neighbours' products.
inline IVec add_products(IVec acc, SVec p, SVec w) {
#if defined(__AVX512VNNI__)
  return (IVec)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)p, (__m512i)w);
#elif defined(__AVX512F__)
  return acc + (IVec)_mm512_madd_epi16((__m512i)p, (__m512i)w);
#elif defined(__AVXVNNI__)
  return (IVec)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)p, (__m256i)w);
#elif defined(__AVX2__)
  return acc + (IVec)_mm256_madd_epi16((__m256i)p, (__m256i)w);
#else
  for (int i = 0; i < LANES; i++) acc[i] += p[2 * i] * w[2 * i] + p[2 * i + 1] * w[2 * i + 1];
  return acc;
#endif
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool LARGE_DOTS = true;
#else
constexpr bool LARGE_DOTS = false;
#endif

// acc plus the sums of four neighbours' products, u being unsigned, and less than 128 unless LARGE_DOTS.
inline I8 add_dots(I8 acc, B32 u, B32 s) {
#if defined(__AVX512VNNI__)
  return (I8)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)u, (__m256i)s);
#elif defined(__AVXVNNI__)
  return (I8)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)u, (__m256i)s);
#elif defined(__AVX2__)
  __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
  return acc + (I8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  int8_t a[32], b[32];
  memcpy(a, &u, 32), memcpy(b, &s, 32);
#if defined(__ARM_FEATURE_DOTPROD)
  int32x4_t halves[2];
  memcpy(halves, &acc, 32);
  for (int i = 0; i < 2; i++) halves[i] = vdotq_s32(halves[i], vld1q_s8(a + 16 * i), vld1q_s8(b + 16 * i));
  memcpy(&acc, halves, 32);
#else
  for (int i = 0; i < 32; i++) acc[i / 4] += a[i] * b[i];
#endif
  return acc;
#endif
}

// The sums of four neighbours' products, both being signed.
inline I8 signed_dots(B32 a, B32 b) {
#if defined(__AVX2__)
  return add_dots(I8{}, (B32)_mm256_abs_epi8((__m256i)a), (B32)_mm256_sign_epi8((__m256i)b, (__m256i)a));
#else
  return add_dots(I8{}, a, b);  // which takes them as signed
#endif
}

// A vector with the same sum.
inline Vec folded(F8 v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_zextps256_ps512((__m256)v);
#elif defined(__AVX2__)
  return v;
#else
  Vec halves[2];
  memcpy(halves, &v, sizeof v);
  return halves[0] + halves[1];
#endif
}

}  // namespace thalweg
