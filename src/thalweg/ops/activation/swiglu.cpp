// Op "silu_and_mul".
#include "recording.h"
#include "rows.h"

using namespace thalweg;

namespace {

template <class T>
void silu_and_mul(const T* x, int64_t x_stride, T* y, int64_t tokens, int64_t I, int threads) {
  parallel_for(worth(threads, 3 * tokens * I * (int64_t)sizeof(T)), tokens, [&](int64_t t) {
    const T* gate = x + t * x_stride;
    in_lanes(I, [&](int64_t i, int64_t n) { store(y + t * I + i, silu(load(gate + i, n)) * load(gate + I + i, n), n); });
  });
}

}  // namespace

extern "C" void thalweg_silu_and_mul(
    int dtype, const void* x, int64_t x_stride, void* y, int64_t tokens, int64_t I, int threads) {
  if (dtype == FLOAT32)
    silu_and_mul((const float*)x, x_stride, (float*)y, tokens, I, threads);
  else
    silu_and_mul((const bf16*)x, x_stride, (bf16*)y, tokens, I, threads);
}

THALWEG_RECORDABLE(silu_and_mul)
