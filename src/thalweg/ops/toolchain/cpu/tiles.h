// Products of tiles (AMX): up to 16 rows of a weight, of up to 16 pairs of bfloat16, times as many pairs of LANES
// tokens; sums in float32. TILE_SHAPES comes first in each thread, TILE_RELEASE last; tiles are named by literals, as
// the compilers' intrinsics want them.
//
// With THALWEG_TILES_IN_C the same is done in plain C, on any machine, and what the processor would refuse aborts.
#pragma once

#include <cstdlib>

#include "vectors.h"

#if defined(THALWEG_TILES_IN_C) || (defined(__AMX_TILE__) && defined(__AMX_BF16__))
#define THALWEG_TILES

namespace thalweg {

constexpr int64_t TILE_ROWS = 16, TILE_WORDS = 16;  // at most

struct alignas(64) TileShapes {  // as ldtilecfg reads them
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t of_rows, int64_t words) {
    rows[tile] = (uint8_t)of_rows, row_bytes[tile] = (uint16_t)(4 * words);
  }
};
static_assert(sizeof(TileShapes) == 64);

#if !defined(THALWEG_TILES_IN_C)

inline void TILE_SHAPES(const TileShapes& shapes) {
  // GCC's intrinsic says that it reads eight bytes: the others would be written after it, or not at all.
  asm volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, at, stride) _tile_loadd(tile, at, stride)
#define TILE_PRODUCT(sums, rows, words) _tile_dpbf16ps(sums, rows, words)
#define TILE_STORE(tile, at, stride) _tile_stored(tile, at, stride)

#else

#define TILE_SHAPES(shapes) (tiles_in_c::of_thread = {shapes, {}})
#define TILE_RELEASE() (tiles_in_c::of_thread = {})
#define TILE_ZERO tiles_in_c::zero
#define TILE_LOAD tiles_in_c::load
#define TILE_PRODUCT tiles_in_c::product
#define TILE_STORE tiles_in_c::store

namespace tiles_in_c {

struct Tiles {
  TileShapes shapes;
  uint32_t at[8][TILE_ROWS][TILE_WORDS];
};
inline thread_local Tiles of_thread = {};

inline void must(bool allowed) {
  if (!allowed) abort();
}

inline int rows_of(int tile) {
  must(of_thread.shapes.rows[tile] > 0 && of_thread.shapes.rows[tile] <= TILE_ROWS);
  return of_thread.shapes.rows[tile];
}

inline int words_of(int tile) {
  must(of_thread.shapes.row_bytes[tile] > 0 && of_thread.shapes.row_bytes[tile] <= 4 * TILE_WORDS);
  return of_thread.shapes.row_bytes[tile] / 4;
}

inline void zero(int tile) { memset(of_thread.at[tile], 0, sizeof of_thread.at[tile]); }

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int r = 0; r < rows_of(tile); r++)
    memcpy(of_thread.at[tile][r], (const char*)from + r * stride, 4 * words_of(tile));
}

inline void store(int tile, void* to, int64_t stride) {
  for (int r = 0; r < rows_of(tile); r++) memcpy((char*)to + r * stride, of_thread.at[tile][r], 4 * words_of(tile));
}

// In the processor's order, halves of the pairs by themselves; it takes subnormal numbers for zeros, and this does not.
inline void product(int sums, int rows, int words) {
  must(rows_of(rows) == rows_of(sums) && words_of(words) == words_of(sums) && rows_of(words) == words_of(rows));
  for (int r = 0; r < rows_of(sums); r++)
    for (int t = 0; t < words_of(sums); t++) {
      float first = 0.f, second = 0.f, sum;
      for (int k = 0; k < words_of(rows); k++) {
        const uint32_t a = of_thread.at[rows][r][k], b = of_thread.at[words][k][t];
        first += to_float(bf16{(uint16_t)a}) * to_float(bf16{(uint16_t)b});
        second += to_float(bf16{(uint16_t)(a >> 16)}) * to_float(bf16{(uint16_t)(b >> 16)});
      }
      memcpy(&sum, &of_thread.at[sums][r][t], sizeof sum);
      sum += first + second;
      memcpy(&of_thread.at[sums][r][t], &sum, sizeof sum);
    }
}

}  // namespace tiles_in_c
#endif
}  // namespace thalweg
#endif
