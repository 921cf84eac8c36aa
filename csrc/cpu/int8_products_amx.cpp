// int8 products with AMX: an instruction multiplies 16 rows by the 16 columns of a panel, 64 deep. The panels have the
// layout of its operand. A few rows would leave most of a tile empty, they go to AVX512-VNNI, which these processors
// have too.
#include "int8_products.h"

#if defined(__AMX_INT8__) || defined(ZTOK_AMX_EMULATION)
#ifdef ZTOK_AMX_EMULATION
#include ZTOK_AMX_EMULATION  // tests/native/amx_emulation.h
#else
#include <immintrin.h>
#endif

namespace ztok {
namespace {

constexpr int64_t kTileRows = 16, kFewRows = 8;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3: sums of two blocks of rows and two panels; 4, 5: the rows; 6, 7: the panels.
void configure(int64_t upper, int64_t lower) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool is_lower = tile == 2 || tile == 3 || tile == 5;
    config.bytes[tile] = 64;
    config.rows[tile] = static_cast<uint8_t>(tile >= 6 ? kTileRows : is_lower ? lower : upper);
  }
  _tile_loadconfig(&config);
}

template <bool kLower, bool kRight>
void tiles(const Int8Call& call, int64_t row, int64_t panel) {
  const uint8_t* left = call.panels + panel * kPanelColumns * call.depth;
  const uint8_t* right = left + kPanelColumns * call.depth;
  const int8_t* upper = call.rows + row * call.row_stride;
  const int8_t* lower = upper + kTileRows * call.row_stride;
  _tile_zero(0);
  if constexpr (kRight) _tile_zero(1);
  if constexpr (kLower) _tile_zero(2);
  if constexpr (kLower && kRight) _tile_zero(3);
  for (int64_t k = 0; k < call.depth; k += kDepthStep) {
    _tile_loadd(4, upper + k, call.row_stride);
    _tile_loadd(6, left + k * kPanelColumns, 64);
    _tile_dpbsud(0, 4, 6);
    if constexpr (kLower) {
      _tile_loadd(5, lower + k, call.row_stride);
      _tile_dpbsud(2, 5, 6);
    }
    if constexpr (kRight) {
      _tile_loadd(7, right + k * kPanelColumns, 64);
      _tile_dpbsud(1, 4, 7);
      if constexpr (kLower) _tile_dpbsud(3, 5, 7);
    }
  }
  const int64_t bytes = 4 * call.sums_stride;
  int32_t* sums = call.sums + row * call.sums_stride + panel * kPanelColumns;
  int32_t* below = sums + kTileRows * call.sums_stride;
  _tile_stored(0, sums, bytes);
  if constexpr (kRight) _tile_stored(1, sums + kPanelColumns, bytes);
  if constexpr (kLower) _tile_stored(2, below, bytes);
  if constexpr (kLower && kRight) _tile_stored(3, below + kPanelColumns, bytes);
}

// The panels hold weight + 128. Sums may wrap around on the way, the result fits.
void correct(const Int8Call& call, int64_t row, int64_t count, int64_t panel, int64_t width) {
  for (int64_t r = row; r < row + count; ++r) {
    const uint32_t less = 128u * static_cast<uint32_t>(call.row_sums[r]);
    int32_t* sums = call.sums + r * call.sums_stride + panel * kPanelColumns;
    for (int64_t c = 0; c < width * kPanelColumns; ++c) {
      sums[c] = static_cast<int32_t>(static_cast<uint32_t>(sums[c]) - less);
    }
  }
}

// Rows [begin, end) in blocks of `upper` + `lower` rows; all blocks have the same size.
void blocks(const Int8Call& call, int64_t begin, int64_t end, int64_t upper, int64_t lower, int64_t num_panels) {
  if (begin == end) return;
  configure(upper, lower > 0 ? lower : upper);
  for (int64_t panel = 0; panel < num_panels; panel += 2) {
    const int64_t width = num_panels - panel > 1 ? 2 : 1;
    for (int64_t row = begin; row < end; row += upper + lower) {
      if (lower > 0) {
        width > 1 ? tiles<true, true>(call, row, panel) : tiles<true, false>(call, row, panel);
      } else {
        width > 1 ? tiles<false, true>(call, row, panel) : tiles<false, false>(call, row, panel);
      }
      correct(call, row, upper + lower, panel, width);
    }
  }
}

void int8_products_in_tiles(const int8_t* rows, int64_t row_stride, int64_t count, const int32_t* row_sums,
                            const uint8_t* panels, int64_t depth, int64_t num_panels, int32_t* sums,
                            int64_t sums_stride) {
  const int64_t pairs = count / (2 * kTileRows) * (2 * kTileRows), rest = count - pairs;
  const int64_t few = rest < kFewRows ? rest : 0, last = rest - few;
  if (count > few) {
    const Int8Call call{rows, row_stride, row_sums, panels, depth, sums, sums_stride};
    const int64_t upper = last < kTileRows ? last : kTileRows;
    blocks(call, 0, pairs, kTileRows, kTileRows, num_panels);
    blocks(call, pairs, pairs + last, upper, last - upper, num_panels);
    _tile_release();
  }
  if (few > 0) {
    int8_products_avx512_vnni()(rows + pairs * row_stride, row_stride, few, row_sums + pairs, panels, depth, num_panels,
                                sums + pairs * sums_stride, sums_stride);
  }
}

}  // namespace

Int8Products int8_products_amx() { return int8_products_in_tiles; }
}  // namespace ztok
#else
namespace ztok {
Int8Products int8_products_amx() { return nullptr; }
}  // namespace ztok
#endif
