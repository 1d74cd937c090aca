// Numbers inside GGML's blocks.
#pragma once

#include "vectors.h"

namespace thalweg {

// Not every compiler has _Float16: GCC 11 and Clang 14 do not on x86, nor does GCC 12 on ARM.
inline float half_at(const uint8_t* p) {
#if defined(__F16C__)
  uint16_t h;
  memcpy(&h, p, 2);
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  __fp16 h;
  memcpy(&h, p, 2);
  return (float)h;
#else
  _Float16 h;
  memcpy(&h, p, 2);
  return (float)h;
#endif
}

// Eight scales and eight minima of six bits in twelve bytes, as a byte each.
struct SixBits {
  uint64_t scales, minima;

  explicit SixBits(const uint8_t* p) {
    uint32_t s, m, high;
    memcpy(&s, p, 4), memcpy(&m, p + 4, 4), memcpy(&high, p + 8, 4);
    scales = (s & 0x3f3f3f3f) | (uint64_t)((high & 0x0f0f0f0f) | ((s >> 2) & 0x30303030)) << 32;
    minima = (m & 0x3f3f3f3f) | (uint64_t)((high >> 4 & 0x0f0f0f0f) | ((m >> 2) & 0x30303030)) << 32;
  }
};

}  // namespace thalweg
