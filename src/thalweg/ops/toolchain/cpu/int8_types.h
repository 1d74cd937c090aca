// What products of integers need of each of GGML's types: quants as unsigned bytes, and scales.
#pragma once

#include "bytes.h"
#include "int8.h"

namespace thalweg {

// Types with blocks of 32: an element is d * (quant - OFFSET).

struct Q8_0 {
  static constexpr int ELEMENTS = 32, BYTES = 34, OFFSET = 128;
  static B32 quants(const uint8_t* b) {
    B32 q;
    memcpy(&q, b + 2, 32);
    return q ^ 128;
  }
};

inline B32 nibbles(const uint8_t* p) {
#if defined(__AVX2__)
  __m128i q = _mm_loadu_si128((const __m128i*)p);
  return (B32)_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(q, 4), q), _mm256_set1_epi8(15));
#else
  B32 q;
  for (int i = 0; i < 16; i++) q[i] = p[i] & 15, q[16 + i] = p[i] >> 4;
  return q;
#endif
}

struct Q4_0 {
  static constexpr int ELEMENTS = 32, BYTES = 18, OFFSET = 8;
  static B32 quants(const uint8_t* b) { return nibbles(b + 2); }
};

struct Q5_0 {
  static constexpr int ELEMENTS = 32, BYTES = 22, OFFSET = 16;
  static B32 quants(const uint8_t* b) {
    uint32_t bits;
    memcpy(&bits, b + 2, 4);
#if defined(__AVX2__)
    // Byte i of the 32 is that with bit i in it, of which nothing else is left.
    const __m256i from = _mm256_setr_epi64x(0, every(1), every(2), every(3));
    const __m256i bit = _mm256_set1_epi64x(0x8040201008040201);
    __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), from), bit);
    return nibbles(b + 6) | (B32)_mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8(16));
#else
    B32 q = nibbles(b + 6);
    for (int i = 0; i < 32; i++) q[i] |= (bits >> i & 1) << 4;
    return q;
#endif
  }
};

// Types with blocks of 256: an element is d * its sub-block's scale * (quant - OFFSET), less the sub-block's minimum.
// SUB is a sub-block's elements; quants<C> are those of vector C of the block.

struct Q4_K {
  static constexpr int ELEMENTS = 256, BYTES = 144, SUB = 32, OFFSET = 0, D = 0;
  template <int C>
  static QVec quants(const uint8_t* b) {
    constexpr int j = C * WIDTH / 32, e = C * WIDTH % 32;
    return shifted<j % 2 * -4, -4>(twice_at(b + 16 + j / 2 * 32 + e)) & every(15);
  }
};

struct Q5_K {
  static constexpr int ELEMENTS = 256, BYTES = 176, SUB = 32, OFFSET = 0, D = 0;
  template <int C>
  static QVec quants(const uint8_t* b) {
    constexpr int j = C * WIDTH / 32, e = C * WIDTH % 32;
    QVec low = shifted<j % 2 * -4, -4>(twice_at(b + 48 + j / 2 * 32 + e)) & every(15);
    return low | (shifted<4 - j, 3 - j>(twice_at(b + 16 + e)) & every(16));
  }
};

struct Q6_K {
  static constexpr int ELEMENTS = 256, BYTES = 210, SUB = 16, OFFSET = 32, D = 208;
  template <int C>
  static QVec quants(const uint8_t* b) {
    constexpr int half = C * WIDTH / 128, j = C * WIDTH / 32 % 4, e = C * WIDTH % 32;
    QVec low = bytes_at(b + half * 64 + j % 2 * 32 + e), high = twice_at(b + 128 + half * 32 + e);
    return (shifted<j / 2 * -4, j / 2 * -4>(low) & every(15)) | (shifted<4 - 2 * j, 2 - 2 * j>(high) & every(48));
  }
};

// The scales of a block as 16 bits each, spread over the sums of two products of vector C.
template <int SUB>
class Scales {
 public:
  // From where 16 signed bytes lie, or of eight bytes.
  explicit Scales(const uint8_t* bytes) {
#if defined(__AVX2__)
    keep(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)bytes)));
#else
    for (int i = 0; i < 16; i++) own_[i] = (int8_t)bytes[i];
#endif
  }

  explicit Scales(uint64_t bytes) {
#if defined(__AVX2__)
    keep(_mm256_cvtepu8_epi16(_mm_cvtsi64_si128(bytes)));
#else
    for (int i = 0; i < 8; i++) own_[i] = bytes >> (8 * i) & 255;
#endif
  }

  template <int C>
  SVec of() const {
    constexpr int first = C * WIDTH / SUB, each = SUB / 2;
#if defined(__AVX512F__)
    SVec from;
    for (int i = 0; i < 32; i++) from[i] = first + i / each;
    return (SVec)_mm512_permutexvar_epi16((__m512i)from, _mm512_castsi256_si512(own_));
#elif defined(__AVX2__)
    if constexpr (each == 16)
      return (SVec)_mm256_set1_epi16(own_[first]);
    else
      return (SVec)_mm256_set_m128i(_mm_set1_epi16(own_[first + 1]), _mm_set1_epi16(own_[first]));
#else
    return SVec{} + own_[first];
#endif
  }

  // The sums of pairs of products of all 16 scales with `sums`.
  IVec times(const int16_t* sums) const {
#if defined(__AVX2__)
    __m256i theirs = _mm256_loadu_si256((const __m256i*)sums);
#if defined(__AVX512F__)
    return (IVec)_mm512_zextsi256_si512(_mm256_madd_epi16(own_, theirs));
#else
    return (IVec)_mm256_madd_epi16(_mm256_load_si256((const __m256i*)own_), theirs);
#endif
#else
    IVec v = {};
    for (int i = 0; i < 16; i++) v[i % LANES] += own_[i] * sums[i];
    return v;
#endif
  }

 private:
#if defined(__AVX512F__)
  void keep(__m256i all) { own_ = all; }
  __m256i own_;
#else
#if defined(__AVX2__)
  void keep(__m256i all) { _mm256_store_si256((__m256i*)own_, all); }
#endif
  alignas(32) int16_t own_[16];
#endif
};

// f(Q) of the type that has this number.
template <class F>
inline void of_type(int32_t type, F&& f) {
  switch (type) {
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

}  // namespace thalweg
