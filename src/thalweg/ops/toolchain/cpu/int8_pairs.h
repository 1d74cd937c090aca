// Two blocks of 32 to a vector of 64 bytes, and the scales of sixteen at once: AVX-512 with products of bytes.
#pragma once

#include "int8_types.h"

#if defined(__AVX512VNNI__)
namespace thalweg {

// The quants of two blocks that follow one another, as unsigned bytes.
template <class Q>
inline __m512i quants_of_pair(const uint8_t* b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)Q::quants(b)), (__m256i)Q::quants(b + Q::BYTES), 1);
}

// Nibbles whose first sixteen bytes are at `first` and `second`.
inline __m512i nibbles_of_pair(const uint8_t* first, const uint8_t* second) {
  __m256i both = _mm256_inserti128_si256(
      _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)first)), _mm_loadu_si128((const __m128i*)second), 1);
  __m512i apart = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
  __m512i low = _mm512_and_si512(apart, _mm512_set1_epi8(15));
  return _mm512_shuffle_i64x2(low, low, _MM_SHUFFLE(3, 1, 2, 0));
}

template <>
inline __m512i quants_of_pair<Q4_0>(const uint8_t* b) {
  return nibbles_of_pair(b + 2, b + Q4_0::BYTES + 2);
}

template <>
inline __m512i quants_of_pair<Q5_0>(const uint8_t* b) {
  uint32_t first, second;
  memcpy(&first, b + 2, 4), memcpy(&second, b + Q5_0::BYTES + 2, 4);
  __m512i low = nibbles_of_pair(b + 6, b + Q5_0::BYTES + 6);
  return _mm512_mask_add_epi8(low, first | (uint64_t)second << 32, low, _mm512_set1_epi8(16));
}

// The scales of `blocks` blocks, 16 at most, each in its lane. Nothing behind the blocks is read.
template <class Q, class Count>
inline __m512 scales_of(const uint8_t* b, Count blocks) {
  constexpr int WORDS = Q::BYTES / 2;           // of a block
  constexpr int GROUP = WORDS <= 9 ? 8 : 4;     // blocks whose scales lie in two vectors
  constexpr int LAST = (GROUP - 1) * WORDS + 1;  // words of a group that are read
  static_assert(LAST <= 64);
  struct Places {
    alignas(64) int16_t word[32];
    constexpr Places() : word{} {
      for (int lane = 0; lane < 32; lane++) word[lane] = lane % GROUP * WORDS;
    }
  };
  static constexpr Places places;
  const __m512i from = _mm512_load_si512(places.word);
  __m512i found = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += GROUP, b += GROUP * Q::BYTES) {
    int64_t words = (blocks - g) * WORDS;
    words = words < 0 ? 0 : words < LAST ? words : LAST;
    const uint64_t there = words == 64 ? ~0ull : (1ull << words) - 1;
    __m512i low = _mm512_maskz_loadu_epi16((__mmask32)there, b);
    __m512i high = _mm512_maskz_loadu_epi16((__mmask32)(there >> 32), b + 64);
    found = _mm512_or_si512(
        found, _mm512_maskz_permutex2var_epi16((__mmask32)((1u << GROUP) - 1) << g, low, from, high));
  }
  return _mm512_cvtph_ps(_mm512_castsi512_si256(found));
}

// Adds the products of an even number of blocks from block `first` of a row on, 16 at most, with N tokens, whose rows
// lie `stride` bytes apart. Count is int64_t, or a constant of it.
template <class Q, int N, class Count>
inline void add_pairs(const uint8_t* w, Count blocks, Rounded32 x, int64_t first, int64_t stride, int64_t near, Vec* acc) {
  IVec spread;
  for (int l = 0; l < LANES; l++) spread[l] = l / 8;
  const __mmask16 some = (1u << blocks) - 1;
  const __m512 scale = scales_of<Q>(w, blocks);
  __m512 both[N];
  Vec odd[N] = {};  // a second sum, since additions wait for one another
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) {
    Rounded32 own{x.at + n * stride, x.columns};
    both[n] = scale * _mm512_maskz_loadu_ps(some, own.d() + first);
    IVec less = (IVec)_mm512_maskz_loadu_epi32(some, own.sums() + first) * -Q::OFFSET;
    acc[n] += (Vec)both[n] * __builtin_convertvector(less, Vec);
  }
#pragma GCC unroll 8
  for (int p = 0; p < 8; p++) {
    if (2 * p >= blocks) break;
    for (int line = 0; line < 2 * Q::BYTES; line += 64) __builtin_prefetch(w + near + line);
    const __m512i q = quants_of_pair<Q>(w), from = (__m512i)(spread + 2 * p);
    w += 2 * Q::BYTES;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const uint8_t* of_token = x.at + n * stride + 32 * (first + 2 * p);
      __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, _mm512_loadu_si512(of_token));
      Vec& sum = p % 2 ? odd[n] : acc[n];
      sum += __builtin_convertvector((IVec)dot, Vec) * (Vec)_mm512_permutexvar_ps(from, both[n]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++) acc[n] += odd[n];
}

}  // namespace thalweg
#endif
