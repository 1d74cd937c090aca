// Op "vocab_rows".
#include "blocks.h"
#include "recording.h"

using namespace thalweg;

// type: the number of GGML's that w is stored in, or -1 if w has y's dtype. Returns 0 if an id is none of V.
extern "C" int thalweg_vocab_rows(
    int dtype, const int64_t* ids, const uint8_t* w, int32_t type, void* y, int64_t tokens, int64_t V, int64_t D) {
  for (int64_t t = 0; t < tokens; t++)
    if (ids[t] < 0 || ids[t] >= V) return 0;
  auto run = [&](auto* to) {
    const BlockMatrix blocks{w, D, 1, &type, &V};
    const int64_t bytes = D * sizeof *to;
    for (int64_t t = 0; t < tokens; t++) {
      if (type < 0) {
        memcpy(to + t * D, w + ids[t] * bytes, bytes);
        continue;
      }
      float* wide = scratch<0>(padded(D));
      blocks.widen(ids[t], 1, wide);
      in_lanes(D, [&](int64_t k, int64_t n) { store(to + t * D + k, load(wide + k, n), n); });
    }
  };
  dtype == FLOAT32 ? run((float*)y) : run((bf16*)y);
  return 1;
}

THALWEG_RECORDABLE(vocab_rows)
