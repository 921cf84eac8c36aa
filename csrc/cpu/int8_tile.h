// Register tiles of int8 products. Each int8_products_<isa>.cpp includes it once, after it has defined, in an unnamed
// namespace inside ztok:
//   kPart                   columns of a tile's narrowest part, 8 or 16
//   kMostSums               sums of one row and one part that fit into the registers
//   kMostRows               rows of the highest tile
//   Columns, load_columns   4 products deep of a part's columns
//   Quad, load_quad         4 elements of a row, for every column
//   Sums                    the sums of one row and one part: zero_sums, add(sums, columns, quad), plus, and
//                           store(to, sums, less): all of them less a constant
// Like kernel files (isa.h), these files share no inline functions with anything.
#pragma once

#include "int8_products.h"

namespace ztok {
namespace {

constexpr int64_t kQuadBytes = 4 * kPanelColumns;  // of a panel, 4 products deep

// A tile of few rows keeps several sums of each, of every kPhases-th quad: enough independent ones to hide the latency
// of the instructions while a single panel is read from front to back, as memory likes it. Integer sums have no order.
constexpr int parts_of(int rows) { return 2 * rows <= kMostSums ? 2 : 1; }
constexpr int phases_of(int rows, int parts) {
  int phases = 1;
  while (phases < 8 && 2 * phases * rows * parts <= kMostSums) phases *= 2;
  return phases;
}

template <int kRows, int kParts>
void int8_tile(const Int8Call& call, int64_t row, int64_t part) {
  constexpr int kPhases = phases_of(kRows, kParts);
  Sums sums[kPhases][kRows][kParts];
#pragma GCC unroll 8
  for (int phase = 0; phase < kPhases; ++phase) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) sums[phase][r][p] = zero_sums();
    }
  }
  const uint8_t* panels[kParts];
#pragma GCC unroll 2
  for (int p = 0; p < kParts; ++p) {
    const int64_t column = (part + p) * kPart;
    panels[p] = call.panels + column / kPanelColumns * kPanelColumns * call.depth + column % kPanelColumns * 4;
  }
  const int8_t* first = call.rows + row * call.row_stride;
  for (int64_t k = 0; k < call.depth; k += 4 * kPhases) {
#pragma GCC unroll 8
    for (int phase = 0; phase < kPhases; ++phase) {
      Columns columns[kParts];
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) columns[p] = load_columns(panels[p] + (k / 4 + phase) * kQuadBytes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Quad quad = load_quad(first + r * call.row_stride + k + 4 * phase);
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) add(sums[phase][r][p], columns[p], quad);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
      Sums sum = sums[0][r][p];
#pragma GCC unroll 8
      for (int phase = 1; phase < kPhases; ++phase) sum = plus(sum, sums[phase][r][p]);
      // The panels hold weight + 128. Sums may wrap around on the way, the result fits.
      const uint32_t less = 128u * static_cast<uint32_t>(call.row_sums[row + r]);
      store(call.sums + (row + r) * call.sums_stride + (part + p) * kPart, sum, static_cast<int32_t>(less));
    }
  }
}

using Int8Tile = void (*)(const Int8Call&, int64_t row, int64_t part);

// The tile for so many rows, with one part or with as many as fit.
template <int kRows>
constexpr Int8Tile tile_of(int rows, bool both) {
  if constexpr (kRows == 0) {
    return nullptr;
  } else {
    if (rows != kRows) return tile_of<kRows - 1>(rows, both);
    return both ? int8_tile<kRows, parts_of(kRows)> : int8_tile<kRows, 1>;
  }
}

void int8_tiles(const int8_t* rows, int64_t row_stride, int64_t count, const int32_t* row_sums, const uint8_t* panels,
                int64_t depth, int64_t num_panels, int32_t* sums, int64_t sums_stride) {
  const Int8Call call{rows, row_stride, row_sums, panels, depth, sums, sums_stride};
  const int64_t parts = num_panels * kPanelColumns / kPart;
  const int rest = static_cast<int>(count % kMostRows);
  const int64_t most = parts_of(count >= kMostRows ? kMostRows : rest);
  const auto run = [&](int height, int64_t row, int64_t part, int64_t width) {
    const int at_once = width > 1 ? parts_of(height) : 1;
    const Int8Tile tile = tile_of<kMostRows>(height, at_once > 1);
    for (int64_t p = part; p < part + width; p += at_once) tile(call, row, p);
  };
  for (int64_t part = 0; part < parts; part += most) {
    const int64_t width = parts - part < most ? parts - part : most;
    for (int64_t row = 0; row + kMostRows <= count; row += kMostRows) run(kMostRows, row, part, width);
    if (rest > 0) run(rest, count - rest, part, width);
  }
}

}  // namespace
}  // namespace ztok
