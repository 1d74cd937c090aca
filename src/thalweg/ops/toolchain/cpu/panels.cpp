#include "panels.h"

#include <type_traits>

namespace thalweg {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;  // with three vectors of tokens: 24 sums, and 32 registers
#else
constexpr int ROWS = 4;
#endif
constexpr int64_t NEAR_WORDS = 128;  // whose sums are added up by themselves: nearer, and a panel's stay in a core's own cache

template <bool PAIR, int R, int V>
inline void tile(Rows w, int64_t words, const float* x, float* out, bool add) {
  using X = std::conditional_t<PAIR, bf16, float>;
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sums[r][v] = Vec{};
  const float* at = w.at;
  while (words > 0) {
    // The next rows are fetched meanwhile, if rows lie as in a weight: the processor does not see that they follow.
    if (w.step == 1)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) __builtin_prefetch(at + (R + r) * w.row);
    const int64_t some = words < 16 ? words : 16;  // a line of each row
    words -= some;
    for (int64_t k = 0; k < some; k++, at += w.step, x += PANEL) {
      Vec xk[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) xk[v] = load(x + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[r][v] = add_product<X>(sums[r][v], xk[v], spread<X>(at + r * w.row));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* to = out + r * PANEL + v * LANES;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
}

template <bool PAIR, int V>
void tiles(Rows w, int64_t count, int64_t words, const float* x, float* out, bool add) {
  for (; words > 0; words -= NEAR_WORDS, w.at += NEAR_WORDS * w.step, x += NEAR_WORDS * PANEL, add = true) {
    const int64_t some = words < NEAR_WORDS ? words : NEAR_WORDS;
    int64_t r = 0;
    for (; r + ROWS <= count; r += ROWS) tile<PAIR, ROWS, V>(w.from(r), some, x, out + r * PANEL, add);
    if (ROWS > 4 && r + 4 <= count) tile<PAIR, 4, V>(w.from(r), some, x, out + r * PANEL, add), r += 4;
    for (; r < count; r++) tile<PAIR, 1, V>(w.from(r), some, x, out + r * PANEL, add);
  }
}

}  // namespace

template <bool PAIR>
void panel_product(Rows rows, int64_t count, int64_t words, const float* x, int vectors, float* out, bool add) {
  if (vectors == 1)
    tiles<PAIR, 1>(rows, count, words, x, out, add);
  else if (vectors == 2)
    tiles<PAIR, 2>(rows, count, words, x, out, add);
  else
    tiles<PAIR, PANEL_VECTORS>(rows, count, words, x, out, add);
}

template void panel_product<false>(Rows, int64_t, int64_t, const float*, int, float*, bool);
#if defined(__AVX512BF16__)
template void panel_product<true>(Rows, int64_t, int64_t, const float*, int, float*, bool);
#endif

void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  typedef float Four __attribute__((vector_size(16)));
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
      Four a[4];
      for (int i = 0; i < 4; i++) memcpy(&a[i], from + (r + i) * from_stride + c, 16);
#if defined(__x86_64__)
      _MM_TRANSPOSE4_PS(a[0], a[1], a[2], a[3]);
#else
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < i; j++) {
          float kept = a[i][j];
          a[i][j] = a[j][i], a[j][i] = kept;
        }
#endif
      for (int i = 0; i < 4; i++) memcpy(to + (c + i) * to_stride + r, &a[i], 16);
    }
    for (; c < columns; c++)
      for (int i = 0; i < 4; i++) memcpy(to + c * to_stride + r + i, from + (r + i) * from_stride + c, 4);
  }
  for (; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) memcpy(to + c * to_stride + r, from + r * from_stride + c, 4);
}

}  // namespace thalweg
