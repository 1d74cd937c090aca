// Vectors of floats of whatever width the compiler was asked for (AVX-512: 16 lanes, AVX2: 8, otherwise 4), in the
// vector extensions that GCC and Clang share, with intrinsics only where those have no word for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace thalweg {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t UVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HVec __attribute__((vector_size(2 * LANES)));

struct bf16 { uint16_t bits; };

struct half { uint16_t bits; };

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1 };  // as cpu_build.DTYPES has them

// Whether the processor multiplies pairs of T in neighbouring columns.
template <class T>
constexpr bool PAIRS = false;
#if defined(__AVX512BF16__) || defined(THALWEG_TILES_IN_C)
template <>
inline constexpr bool PAIRS<bf16> = true;
#endif

inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would be an addition, which -0 needs

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const bf16* p) {
  HVec h;
  memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
}

inline Vec load(const half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  __fp16 h __attribute__((vector_size(2 * LANES)));
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Vec);
#else
  Vec v;
  _Float16 h[LANES];
  memcpy(h, p, sizeof h);
  for (int i = 0; i < LANES; i++) v[i] = h[i];
  return v;
#endif
}

// The first n < LANES elements, and zeros behind them.
template <class T>
inline Vec load_some(const T* p, int64_t n) {
  T some[LANES] = {};
  memcpy(some, p, n * sizeof(T));
  return load(some);
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// Rounded to nearest, ties to even; NaN stays NaN.
inline void store(bf16* p, Vec v) {
  UVec u = (UVec)v;
  UVec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  rounded = (v == v) ? rounded : (UVec{} + 0x7fc0);
  HVec h = __builtin_convertvector(rounded, HVec);
  memcpy(p, &h, sizeof h);
}

// As it is after it was stored as T.
template <class T>
inline Vec rounded(Vec v) {
  T stored[LANES];
  store(stored, v);
  return load(stored);
}

template <>
inline Vec rounded<float>(Vec v) { return v; }

template <>
inline Vec rounded<bf16>(Vec v) {  // without a detour over memory
  UVec u = (UVec)v;
  UVec nearest = (u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u;
  return (Vec)((v == v) ? nearest : UVec{} + 0x7fc00000u);
}

// What products of activations in X take of a row at once: a vector of numbers, or of pairs in bfloat16.
template <class X>
constexpr int64_t STEP = sizeof(X) == 2 ? 2 * LANES : LANES;

template <class X, class T>
inline Vec operands(const T* p) {
  if constexpr (sizeof(X) == 4) return load(p);
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

// The first n < STEP elements, and zeros behind them.
template <class X, class T>
inline Vec some_operands(const T* p, int64_t n) {
  T some[STEP<X>] = {};
  memcpy(some, p, n * sizeof(T));
  return operands<X>(some);
}

// A number, or a pair, in all lanes.
template <class X>
inline Vec spread(const float* p) {
  if constexpr (sizeof(X) == 4) return splat(*p);
  int32_t bits;
  memcpy(&bits, p, sizeof bits);
  return (Vec)(IVec{} + bits);
}

// sum + a * b, of numbers or of pairs.
template <class X>
inline Vec add_product(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(X) == 2) return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif defined(THALWEG_TILES_IN_C)
  const UVec p = (UVec)a, q = (UVec)b, high = UVec{} + 0xffff0000u;
  if constexpr (sizeof(X) == 2) return sum + (Vec)(p << 16) * (Vec)(q << 16) + (Vec)(p & high) * (Vec)(q & high);
#endif
  return sum + a * b;
}

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline void put(float* p, float x) { *p = x; }

inline void put(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  p->bits = x == x ? (u + 0x7fff + ((u >> 16) & 1)) >> 16 : 0x7fc0;
}

template <class T>
inline void store_some(T* p, Vec v, int64_t n) {
  T some[LANES];
  store(some, v);
  memcpy(p, some, n * sizeof(T));
}

// f(offset, count) for 0 .. n in steps of LANES; count is less than LANES for a rest alone.
template <class F>
inline void in_lanes(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) f(i, (int64_t)LANES);
  if (i < n) f(i, n - i);
}

template <class T>
inline Vec load(const T* p, int64_t count) {
  return count == LANES ? load(p) : load_some(p, count);
}

template <class T>
inline void store(T* p, Vec v, int64_t count) {
  if (count == LANES)
    store(p, v);
  else
    store_some(p, v, count);
}

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total[LANES];
  store(total, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) total[i] += total[i + half];
  return total[0];
#endif
}

// The sums of four vectors, each in the same order whichever of the four it is.
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
#if defined(__AVX512F__)
  auto half = [](Vec v) {
    return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  };
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#elif defined(__AVX2__)
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

inline float largest(Vec v) {
  float all[LANES], most;
  store(all, v);
  most = all[0];
  for (int i = 1; i < LANES; i++) most = all[i] > most ? all[i] : most;
  return most;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// e^x to 2 units in the last place; 0 below the smallest normal number, infinity from e^88.38 (the largest is e^88.72),
// whose exponent rounds to 128, and NaN of NaN.
inline Vec exp(Vec x) {
  Vec clamped = x > 88.7f ? splat(88.7f) : x;
  clamped = clamped < -87.33f ? splat(-87.33f) : clamped;
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = clamped * 1.44269504088896341f + magic;
  IVec exponent = (IVec)n - (IVec)magic;
  n -= magic;
  Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  Vec scaled = p * (Vec)((exponent + 127) << 23);
  return x < -87.33f ? Vec{} : scaled;
}

// log x of normal numbers above zero.
inline Vec log(Vec x) {
  IVec bits = (IVec)x;
  IVec exponent = ((bits - 0x3f3504f3) >> 23);  // so that the mantissa lies between sqrt(1/2) and sqrt(2)
  Vec m = (Vec)(bits - (exponent << 23)) - 1.f;
  Vec e = __builtin_convertvector(exponent, Vec);
  Vec p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  Vec square = m * m;
  Vec y = p * m * square + e * -2.12194440e-4f - 0.5f * square;
  return m + y + e * 0.693359375f;
}

// log(1 + x) for 0 <= x <= 1, without losing the digits of a small x.
inline Vec log1p(Vec x) {
  Vec u = x + 1.f, rest = u - 1.f;
  return rest == 0.f ? x : log(u) * x / rest;
}

inline Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

inline Vec silu(Vec x) { return x * sigmoid(x); }

inline Vec softplus(Vec x) {
  Vec size = x < 0.f ? -x : x;
  return (x > 0.f ? x : Vec{}) + log1p(exp(-size));
}

inline float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

inline float softplus(float x) { return (x > 0.f ? x : 0.f) + std::log1p(std::exp(-std::fabs(x))); }

}  // namespace thalweg
