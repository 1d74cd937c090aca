#include "int8_panels.h"

#include "int8_types.h"

namespace thalweg {
namespace {

// Blocks of which size a weight has.
struct Sizes {
  bool small = false, large = false;
  explicit Sizes(const RoundedMatrix& w) {
    for (int i = 0; i < w.segments; i++) of_type(w.types[i], [&](auto q) { (q.ELEMENTS == 256 ? large : small) = true; });
  }
};

// How the rows n to a lane are rounded: as `Rounding` of int8.cpp does it for a row.
struct LaneRounding {
  Vec d, inverse;

  LaneRounding(const float* x, int n) {
    Vec most = {}, off = {};
    for (int k = 0; k < n; k++) {
      Vec v = load(x + k * PANEL);
      most = larger(v < 0.f ? -v : v, most);
      off += v - v;
    }
    inverse = most > 0.f ? 127.f / most : Vec{};
    d = most / 127.f + off;
  }

  // The lowest byte and its sign. It is no step where v or `inverse` is not finite, but sums of it cannot overflow.
  IVec operator()(Vec v) const {
    const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    return (IVec)(v * inverse + magic) << 24 >> 24;
  }
};

#if defined(THALWEG_DOT4)

// Words of a panel behind its quants, for blocks of 32: d and the sum of quants of each; of 256: d of each, sums of
// quants of each 16, and d times those of each 32.
struct Layout {
  int64_t columns;
  int64_t quants() const { return columns / 4; }
  int64_t of_32() const { return quants() + columns / 16; }
  int64_t of_256() const { return quants() + columns / 256 + columns / 16 + columns / 32; }
};

#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool SIGNED = true;  // both factors are
#else
constexpr bool SIGNED = false;  // the weights' are not
#endif

inline IVec add_dots(IVec acc, int32_t w, QVec x) {
#if defined(__AVX512VNNI__)
  return (IVec)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(w), (__m512i)x);
#elif defined(__AVXVNNI__)
  return (IVec)_mm256_dpbusd_avx_epi32((__m256i)acc, _mm256_set1_epi32(w), (__m256i)x);
#else
  return (IVec)vdotq_s32((int32x4_t)acc, vreinterpretq_s8_s32(vdupq_n_s32(w)), (int8x16_t)x);
#endif
}

// n columns of a panel as words of quants, from which `sums` gets those of each `sub` columns; gives d.
inline Vec round_columns(const float* x, int n, float* words, int sub, float* sums) {
  LaneRounding rounding(x, n);
  IVec sum = {};
  for (int k = 0; k < n; k += 4) {
    IVec word = {};
    for (int i = 0; i < 4; i++) {
      IVec q = rounding(load(x + (k + i) * PANEL));
      sum += q;
      word |= (q & 255) << (8 * i);
    }
    store(words + k / 4 * PANEL, (Vec)word);
    if ((k + 4) % sub == 0) store(sums + k / sub * PANEL, (Vec)sum), sum = IVec{};
  }
  return rounding.d;
}

void round_32(const float* x, int64_t columns, float* out) {
  float *d = out + columns / 4 * PANEL, *sums = d + columns / 32 * PANEL;
  for (int64_t b = 0; b < columns / 32; b++)
    store(d + b * PANEL, round_columns(x + 32 * b * PANEL, 32, out + 8 * b * PANEL, 32, sums + b * PANEL));
}

void round_256(const float* x, int64_t columns, float* out) {
  float *d = out + columns / 4 * PANEL, *sums = d + columns / 256 * PANEL, *parts = sums + columns / 16 * PANEL;
  for (int64_t b = 0; b < columns / 256; b++) {
    float* own = sums + 16 * b * PANEL;
    Vec scale = round_columns(x + 256 * b * PANEL, 256, out + 64 * b * PANEL, 16, own);
    store(d + b * PANEL, scale);
    for (int j = 0; j < 8; j++) {
      IVec both = (IVec)load(own + 2 * j * PANEL) + (IVec)load(own + (2 * j + 1) * PANEL);
      store(parts + (8 * b + j) * PANEL, scale * __builtin_convertvector(both, Vec));
    }
  }
}

// A row: its quants as bytes, scales of each SUB columns, and minima of each 32 if the type has them.
template <class Q>
inline void unpack_row(const uint8_t* b, int64_t columns, float* out) {
  uint8_t* quants = (uint8_t*)out;
  float *scales = out + columns / 4, *minima = scales + columns / 16;
  for (int64_t k = 0; k < columns; k += Q::ELEMENTS, b += Q::BYTES) {
    if constexpr (Q::ELEMENTS == 32) {
      B32 q = Q::quants(b);
      if (SIGNED && Q::OFFSET == 128) q ^= 128;
      memcpy(quants + k, &q, 32);
      scales[k / 32] = half_at(b);
    } else {
      unrolled<256 / WIDTH>([&](auto c) {
        QVec q = Q::template quants<c>(b);
        memcpy(quants + k + c * WIDTH, &q, WIDTH);
      });
      const float d = half_at(b + Q::D);
      if constexpr (Q::SUB == 16) {
        for (int j = 0; j < 16; j++) scales[k / 16 + j] = d * (int8_t)b[192 + j];
      } else {
        const float dmin = half_at(b + 2);
        const SixBits bits(b + 4);
        for (int j = 0; j < 8; j++) {
          scales[k / 32 + j] = d * (int)(bits.scales >> (8 * j) & 63);
          minima[k / 32 + j] = dmin * (int)(bits.minima >> (8 * j) & 63);
        }
      }
    }
  }
}

template <class Q>
constexpr int sub_of() {
  if constexpr (Q::ELEMENTS == 32)
    return 32;
  else
    return Q::SUB;
}

template <class Q, int R, int V>
inline void tile(const float* w, int64_t stride, int64_t columns, const float* x, float* out) {
  constexpr int SUB = sub_of<Q>(), OFFSET = SIGNED && Q::OFFSET == 128 ? 0 : Q::OFFSET;
  constexpr bool MINIMA = Q::OFFSET == 0;
  const float *d = x + columns / 4 * PANEL, *sums = d + columns / Q::ELEMENTS * PANEL;
  const float* parts = sums + columns / 16 * PANEL;
  Vec acc[R][V] = {};
  for (int64_t j = 0; j < columns / SUB; j++) {
    IVec dot[R][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      IVec less = OFFSET ? (IVec)load(sums + j * PANEL + v * LANES) * -OFFSET : IVec{};
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) dot[r][v] = less;
    }
#pragma GCC unroll 8
    for (int g = 0; g < SUB / 4; g++) {
      QVec xg[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) xg[v] = (QVec)load(x + (j * (SUB / 4) + g) * PANEL + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int32_t word;
        memcpy(&word, w + r * stride + j * (SUB / 4) + g, 4);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) dot[r][v] = add_dots(dot[r][v], word, xg[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      Vec dv = load(d + j * SUB / Q::ELEMENTS * PANEL + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        acc[r][v] += __builtin_convertvector(dot[r][v], Vec) * (dv * w[r * stride + columns / 4 + j]);
      if constexpr (MINIMA) {
        Vec part = load(parts + j * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) acc[r][v] -= part * w[r * stride + columns / 4 + columns / 16 + j];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(out + r * PANEL + v * LANES, acc[r][v]);
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 4;
#else
constexpr int ROWS = 2;
#endif

template <class Q, int V>
void tiles(const float* w, int64_t count, int64_t columns, const float* x, float* out) {
  const int64_t stride = unpacked_words(columns);
  int64_t r = 0;
  for (; r + ROWS <= count; r += ROWS) tile<Q, ROWS, V>(w + r * stride, stride, columns, x, out + r * PANEL);
  for (; r < count; r++) tile<Q, 1, V>(w + r * stride, stride, columns, x, out + r * PANEL);
}

#endif

}  // namespace

#if defined(THALWEG_DOT4)

int64_t rounded_words(const RoundedMatrix& w) {
  const Sizes sizes(w);
  const Layout layout{w.columns};
  return sizes.small * layout.of_32() + sizes.large * layout.of_256();
}

void round_panel(const RoundedMatrix& w, const float* floats, int vectors, float* out) {
  const Sizes sizes(w);
  for (int v = 0; v < vectors; v++, floats += LANES, out += LANES) {
    if (sizes.small) round_32(floats, w.columns, out);
    if (sizes.large) round_256(floats, w.columns, out + sizes.small * Layout{w.columns}.of_32() * PANEL);
  }
}

int64_t unpacked_words(int64_t columns) { return columns / 4 + columns / 16 + columns / 32; }

void unpack_rows(const RoundedMatrix& w, int64_t first, int64_t count, float* out) {
  w.in_segments(first, count, [&](int32_t type, const uint8_t* rows, int64_t here, int64_t at) {
    of_type(type, [&](auto q) {
      for (int64_t r = 0; r < here; r++)
        unpack_row<decltype(q)>(
            rows + r * (w.columns / q.ELEMENTS * q.BYTES), w.columns, out + (at + r) * unpacked_words(w.columns));
    });
  });
}

void rounded_product(const RoundedMatrix& w, UnpackedRows rows, int64_t count, const float* x, int vectors, float* out) {
  const Sizes sizes(w);
  w.in_segments(rows.first, count, [&](int32_t type, const uint8_t*, int64_t here, int64_t at) {
    of_type(type, [&](auto q) {
      using Q = decltype(q);
      const float* panel = x + (q.ELEMENTS == 256 && sizes.small ? Layout{w.columns}.of_32() * PANEL : 0);
      const float* own = rows.at + at * unpacked_words(w.columns);
      auto product = vectors == 1 ? tiles<Q, 1> : vectors == 2 ? tiles<Q, 2> : tiles<Q, PANEL_VECTORS>;
      product(own, here, w.columns, panel, out + at * PANEL);
    });
  });
}

#else

int64_t rounded_words(const RoundedMatrix& w) {
  const Sizes sizes(w);
  return w.columns * (sizes.small + sizes.large);
}

void round_panel(const RoundedMatrix& w, const float* floats, int vectors, float* out) {
  const Sizes sizes(w);
  for (int size : {32, 256}) {
    if (!(size == 32 ? sizes.small : sizes.large)) continue;
    for (int64_t b = 0; b < w.columns / size; b++)
      for (int v = 0; v < vectors; v++) {
        const LaneRounding rounding(floats + b * size * PANEL + v * LANES, size);
        for (int64_t k = b * size; k < (b + 1) * size; k++) {
          IVec q = rounding(load(floats + k * PANEL + v * LANES));
          store(out + k * PANEL + v * LANES, rounding.d * __builtin_convertvector(q, Vec));
        }
      }
    out += w.columns * PANEL;
  }
}

int64_t unpacked_words(int64_t columns) { return columns; }

void unpack_rows(const RoundedMatrix& w, int64_t first, int64_t count, float* out) { w.widen(first, count, out); }

void rounded_product(const RoundedMatrix& w, UnpackedRows rows, int64_t count, const float* x, int vectors, float* out) {
  const Sizes sizes(w);
  w.in_segments(rows.first, count, [&](int32_t type, const uint8_t*, int64_t here, int64_t at) {
    of_type(type, [&](auto q) {
      const float* panel = x + (q.ELEMENTS == 256 && sizes.small ? w.columns * PANEL : 0);
      panel_product<false>({rows.at + at * w.columns, w.columns}, here, w.columns, panel, vectors, out + at * PANEL, false);
    });
  });
}

#endif

}  // namespace thalweg
