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

#if defined(THALWEG_TILES)
// Of as many rows, and words at once, as the tiles were shaped for: sums lie in tiles 0 to 2, the weight's words in 3,
// the tokens' in 4 to 6.
template <int V>
inline void sums_in_tiles(Rows w, int64_t words, int64_t at_once, const float* x, float* out, bool add) {
  constexpr int64_t NEXT = 4 * PANEL;  // bytes
  if (add) {
    TILE_LOAD(0, out, NEXT);
    if constexpr (V > 1) TILE_LOAD(1, out + LANES, NEXT);
    if constexpr (V > 2) TILE_LOAD(2, out + 2 * LANES, NEXT);
  } else {
    TILE_ZERO(0);
    if constexpr (V > 1) TILE_ZERO(1);
    if constexpr (V > 2) TILE_ZERO(2);
  }
  for (; words > 0; words -= at_once, w.at += at_once, x += at_once * PANEL) {
    TILE_LOAD(3, w.at, 4 * w.row);
    TILE_LOAD(4, x, NEXT);
    if constexpr (V > 1) TILE_LOAD(5, x + LANES, NEXT);
    if constexpr (V > 2) TILE_LOAD(6, x + 2 * LANES, NEXT);
    TILE_PRODUCT(0, 3, 4);
    if constexpr (V > 1) TILE_PRODUCT(1, 3, 5);
    if constexpr (V > 2) TILE_PRODUCT(2, 3, 6);
  }
  TILE_STORE(0, out, NEXT);
  if constexpr (V > 1) TILE_STORE(1, out + LANES, NEXT);
  if constexpr (V > 2) TILE_STORE(2, out + 2 * LANES, NEXT);
}

// As tiles, of pairs in rows whose words lie side by side.
template <int V>
void in_tiles(Rows w, int64_t count, int64_t words, const float* x, float* out, bool add) {
  static_assert(V <= 3 && NEAR_WORDS % TILE_WORDS == 0);
  TileShapes shapes;
  while (words > 0) {
    const int64_t at_once = words < TILE_WORDS ? words : TILE_WORDS, whole = words / at_once * at_once;
    const int64_t some = whole < NEAR_WORDS ? whole : NEAR_WORDS;
    for (int64_t r = 0; r < count; r += TILE_ROWS) {
      const int64_t rows = count - r < TILE_ROWS ? count - r : TILE_ROWS;
      if (shapes.rows[0] != rows || shapes.rows[4] != at_once) {
        for (int v = 0; v < V; v++) shapes.set(v, rows, LANES), shapes.set(4 + v, at_once, LANES);
        shapes.set(3, rows, at_once);
        TILE_SHAPES(shapes);
      }
      sums_in_tiles<V>(w.from(r), some, at_once, x, out + r * PANEL, add);
    }
    words -= some, w.at += some, x += some * PANEL, add = true;
  }
  TILE_RELEASE();
}
#endif

}  // namespace

template <bool PAIR>
void panel_product(Rows rows, int64_t count, int64_t words, const float* x, int vectors, float* out, bool add) {
#if defined(THALWEG_TILES)
  if (PAIR && rows.step == 1) {
    auto product = vectors == 1 ? in_tiles<1> : vectors == 2 ? in_tiles<2> : in_tiles<PANEL_VECTORS>;
    return product(rows, count, words, x, out, add);
  }
#endif
  if (vectors == 1)
    tiles<PAIR, 1>(rows, count, words, x, out, add);
  else if (vectors == 2)
    tiles<PAIR, 2>(rows, count, words, x, out, add);
  else
    tiles<PAIR, PANEL_VECTORS>(rows, count, words, x, out, add);
}

template void panel_product<false>(Rows, int64_t, int64_t, const float*, int, float*, bool);
#if defined(__AVX512BF16__) || defined(THALWEG_TILES_IN_C)
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
