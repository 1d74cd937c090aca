// Ops whose calls can be made again from a list, with the arguments that they had (replay.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace thalweg {

// An argument takes 8 bytes: an integer or an address all of them, a float the first 4.
constexpr int64_t SLOT = 8;

template <class T>
inline T argument(const char* slot) {
  using Stored = std::conditional_t<std::is_integral_v<T>, int64_t, T>;
  static_assert(sizeof(Stored) <= SLOT);
  Stored stored;
  memcpy(&stored, slot, sizeof stored);
  return (T)stored;
}

template <class R, class... Args, size_t... I>
inline int call(R (*function)(Args...), const char* slots, std::index_sequence<I...>) {
  if constexpr (std::is_void_v<R>) {
    function(argument<Args>(slots + SLOT * I)...);
    return 1;
  } else {
    return function(argument<Args>(slots + SLOT * I)...);
  }
}

template <class R, class... Args>
inline int call(R (*function)(Args...), const char* slots) {
  return call(function, slots, std::index_sequence_for<Args...>{});
}

}  // namespace thalweg

// Defines thalweg_<name>_again, which takes the arguments of thalweg_<name> from slots. 0: it failed.
#define THALWEG_RECORDABLE(name) \
  extern "C" int thalweg_##name##_again(const char* slots) { return thalweg::call(thalweg_##name, slots); }
