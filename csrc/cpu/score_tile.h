// A matrix product of rows with codes whose result is consumed tile by tile: packing and the register tile. Included by
// kernel files only (see isa.h); their sources say what happens to the scores.
//
// Codes are packed in panels of kPanel, k-major, rows in tiles of kTileRows, k-major too, so that the innermost loop
// reads both in order: 2 vectors of codes, kTileRows broadcast numbers of rows, 2 * kTileRows fused multiply-adds into
// as many accumulators. Of the 16 registers of AVX2 that leaves 4 for operands. The width is cut into parts of at most
// kMaxDepth: a panel of that depth (16 KB) stays in L1 while all tiles of a row block pass by.
#pragma once

#include "score_layout.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {

constexpr int kPanel = 2 * kWidth;
static_assert(kBlockCodes % kPanel == 0, "a code block is whole panels");

inline int64_t panels_of(int64_t codes) { return (codes + kPanel - 1) / kPanel; }

typedef Vec Tile[kTileRows][2];

// tile[r] += sum over k of x[k][r] * panel[k]
inline __attribute__((always_inline)) void accumulate(const float* x, const float* panel, int64_t depth, Tile& tile) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, x += kTileRows, panel += kPanel) {
    const Vec left = load(panel), right = load(panel + kWidth);
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) {
      const Vec value = broadcast(x[r]);
      tile[r][0] = fma(value, left, tile[r][0]);
      tile[r][1] = fma(value, right, tile[r][1]);
    }
  }
}

// Asks for floats that are needed soon, for L2: the tile at work fills L1.
inline void prefetch(const float* floats, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(floats + i, 0, 2);
}

// Every row of the tile starts from the same scores.
inline void start(const float* scores, Tile& tile) {
  const Vec left = load(scores), right = load(scores + kWidth);
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) tile[r][0] = left, tile[r][1] = right;
}

inline void load_tile(const float* scores, Tile& tile) {
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
    tile[r][0] = load(scores + r * kPanel);
    tile[r][1] = load(scores + r * kPanel + kWidth);
  }
}

inline void store_tile(float* scores, const Tile& tile) {
#pragma GCC unroll 6
  for (int r = 0; r < kTileRows; ++r) {
    store(scores + r * kPanel, tile[r][0]);
    store(scores + r * kPanel + kWidth, tile[r][1]);
  }
}

// The first n elements of the centre from k on; without one zeros, which change no number they are taken from.
inline Vec centre_at(const float* centre, int64_t k, int n) {
  return centre == nullptr ? zeros() : n >= kWidth ? load(centre + k) : load_first(centre + k, n);
}

// Packs rows[index[i]], i < count, of `width` floats each, less `centre` [width] unless it is null; what is missing in
// the last tile is 0. `tiles` holds tiles * kTileRows * width + kWidth floats: for each part of the width, for each
// tile, for each k, kTileRows numbers.
inline void pack_rows(const float* rows, const int32_t* index, int64_t count, int64_t width, const float* centre,
                      float* tiles) {
  const int64_t part = part_depth(width);
  float* target = tiles;
  for (int64_t first = 0; first < width; first += part) {
    const int64_t depth = smaller(part, width - first);
    for (int64_t t = 0; t < count; t += kTileRows) {
      const int present = static_cast<int>(smaller(kTileRows, count - t));
      const float* source[kTileRows];
      for (int r = 0; r < kTileRows; ++r) source[r] = rows + index[t + (r < present ? r : 0)] * width + first;
      int64_t k = 0;
      if constexpr (kWidth >= kTileRows) {
        for (; k + kWidth <= depth; k += kWidth) {
          Vec square[kWidth];
          const Vec less = centre_at(centre, first + k, kWidth);
          for (int r = 0; r < kWidth; ++r) {
            square[r] = r < present ? load(source[r < kTileRows ? r : 0] + k) - less : zeros();
          }
          transpose(square);
          // Each store reaches past its kTileRows numbers; the next one, or that of the next tile, sets this right.
          for (int i = 0; i < kWidth; ++i, target += kTileRows) store(target, square[i]);
        }
      }
      for (; k < depth; ++k, target += kTileRows) {
        const float c = centre ? centre[first + k] : 0.0f;
        for (int r = 0; r < kTileRows; ++r) target[r] = r < present ? source[r][k] - c : 0.0f;
      }
    }
  }
}

// Packs `count` codes, rows of `width` elements `stride` apart, less `centre`, into panels: for each part of the width,
// for each panel, for each k, kPanel numbers; what is missing in the last panel is 0. `squares` [panels * kPanel] gets
// the sums of the squares of what is packed, in float32.
template <typename T>
void pack_panels(const T* codes, int64_t stride, int64_t count, int64_t width, const float* centre, float* panels,
                 float* squares) {
  const int64_t num_panels = panels_of(count), part = part_depth(width);
  for (int64_t group = 0; group < num_panels * 2; ++group) {  // kWidth codes: half a panel
    const int present = static_cast<int>(smaller(kWidth, count - group * kWidth));
    Vec square = zeros();
    for (int64_t first = 0; first < width; first += part) {
      const int64_t depth = smaller(part, width - first);
      float* target = panels + first * num_panels * kPanel + (group / 2) * depth * kPanel + (group % 2) * kWidth;
      for (int64_t k = 0; k < depth; k += kWidth) {
        const int columns = static_cast<int>(smaller(kWidth, depth - k));
        const T* source = codes + group * kWidth * stride + first + k;
        const Vec less = centre_at(centre, first + k, columns);
        Vec block[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          block[i] = i >= present       ? zeros()
                     : columns < kWidth ? load_first(source + i * stride, columns) - less
                                        : load(source + i * stride) - less;
        }
        transpose(block);
        for (int i = 0; i < columns; ++i) {
          store(target + (k + i) * kPanel, block[i]);
          square = fma(block[i], block[i], square);
        }
      }
    }
    store(squares + group * kWidth, square);
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
