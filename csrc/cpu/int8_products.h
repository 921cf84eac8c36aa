// Exact products of int8 rows with uint8 panels: the integer part of every int8 linear layer.
#pragma once

#include <cstdint>

namespace ztok {

constexpr int64_t kPanelColumns = 16;  // output channels of one panel
constexpr int64_t kDepthStep = 64;     // depth is padded to a multiple of this, in rows (with 0) and panels (with 128)

// sums[r * sums_stride + c] = sum over k of rows[r * row_stride + k] * (weight[c][k]), for r < count and
// c < num_panels * kPanelColumns.
//   rows      int8, depth of them valid in each row; row_sums[r] is the sum of row r
//   panels    uint8 [num_panels, depth / 4, kPanelColumns, 4]: weight + 128
//   depth     a multiple of kDepthStep
// A panel is read once per call and the rows once per panel: up to a few hundred rows they stay in the cache meanwhile.
using Int8Products = void (*)(const int8_t* rows, int64_t row_stride, int64_t count, const int32_t* row_sums,
                              const uint8_t* panels, int64_t depth, int64_t num_panels, int32_t* sums,
                              int64_t sums_stride);

// The arguments as they are handed on, without the numbers of rows and panels.
struct Int8Call {
  const int8_t* rows;
  int64_t row_stride;
  const int32_t* row_sums;
  const uint8_t* panels;
  int64_t depth;
  int32_t* sums;
  int64_t sums_stride;
};

// The best one for this processor and the instruction set in use (isa.h), or the one that a test has forced.
Int8Products int8_products();

// Each is null where the compiler does not have the instructions. Whether the processor has them is int8_products.cpp's
// concern. The order is that of torch.ops.ztok.int8_isa_native.
enum class Int8Isa : int { plain = 0, avx2 = 1, avx_vnni = 2, avx512 = 3, avx512_vnni = 4, amx = 5 };
Int8Products int8_products_avx2();
Int8Products int8_products_avx_vnni();
Int8Products int8_products_avx512();
Int8Products int8_products_avx512_vnni();
Int8Products int8_products_amx();

}  // namespace ztok
