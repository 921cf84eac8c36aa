// Rows on their way through a linear layer of the engine.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine_kernel.h"
#include "engine_model.h"
#include "int8_rows_kernel.h"
#include "ordered_products_kernel.h"
#include "share.h"
#include "standard_arithmetic.h"

namespace ztok {

inline int64_t padded_depth(int64_t width) { return (width + kDepthStep - 1) / kDepthStep * kDepthStep; }

// Rows in int8 with their sums and scales.
struct QuantisedRows {
  int8_t* values;  // [rows, stride]; zeros from a layer's width to its padded depth
  int64_t stride;
  int32_t* sums;
  float* scales;
};

inline void quantise_row(const float* x, int64_t width, const QuantisedRows& rows, int64_t row) {
  ZTOK_SELECT(quantize_rows)
  (x, width, 1, width, rows.values + row * rows.stride, rows.stride, padded_depth(width), rows.sums + row,
   rows.scales + row);
}

// Input rows of a linear layer: as floats, and in int8 where the model is.
struct EngineRows {
  const float* floats;
  int64_t width;
  QuantisedRows quantised;
};

inline Scratch& product_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

constexpr int64_t kMostPanels = 4;  // of one block of products

// use(products, first column) for the columns of panels [begin, end) and `count` rows from `first` on. Products of a
// few columns at a time stay in the cache.
template <typename Use>
void engine_products(const EngineLinear& linear, const EngineRows& rows, int64_t first, int64_t count, int64_t begin,
                     int64_t end, const Use& use) {
  constexpr int64_t kStride = kMostPanels * kPanelColumns;
  float* memory = product_scratch().get(count * kStride);
  for (int64_t panel = begin; panel < end; panel += kMostPanels) {
    const int64_t panels = std::min(kMostPanels, end - panel), column = panel * kPanelColumns;
    Products products{memory,
                      kStride,
                      count,
                      std::min(panels * kPanelColumns, linear.columns - column),
                      nullptr,
                      nullptr,
                      linear.bias == nullptr ? nullptr : linear.bias + column};
    if (linear.scales != nullptr) {
      const QuantisedRows& q = rows.quantised;
      const int64_t depth = padded_depth(linear.depth);
      int8_products()(q.values + first * q.stride, q.stride, count, q.sums + first, linear.panels + column * depth,
                      depth, panels, reinterpret_cast<int32_t*>(memory), kStride);
      products.weight_scales = linear.scales + column;
      products.row_scales = q.scales + first;
    } else {
      ZTOK_SELECT(ordered_products)
      (rows.floats + first * rows.width, rows.width, count,
       reinterpret_cast<const float*>(linear.panels) + column * linear.depth, linear.depth, panels, memory, kStride);
    }
    use(products, column);
  }
}

}  // namespace ztok
