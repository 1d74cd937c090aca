// Op "gated_add".
#include "recording.h"
#include "rows.h"

using namespace thalweg;

extern "C" void thalweg_gated_add(
    int dtype,
    const void* residual,
    int64_t residual_stride,
    const void* a,
    const void* gate,
    int64_t gate_stride,
    void* y,
    int64_t tokens,
    int64_t columns) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    for (int64_t t = 0; t < tokens; t++) {
      const T *of_token = (const T*)residual + t * residual_stride, *added = (const T*)a + t * columns;
      const T* open = (const T*)gate + t * gate_stride;
      Vec factor = gate ? rounded<T>(sigmoid(splat(to_float(*open)))) : splat(1.f);
      in_lanes(columns, [&](int64_t i, int64_t n) {
        store((T*)y + t * columns + i, load(of_token + i, n) + rounded<T>(load(added + i, n) * factor), n);
      });
    }
  };
  dtype == FLOAT32 ? run(float{}) : run(bf16{});
}

THALWEG_RECORDABLE(gated_add)
