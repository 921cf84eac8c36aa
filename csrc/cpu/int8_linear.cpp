// int8_linear on the CPU: rows become int8, exact integer products, scales (docs/determinism.md).
//
// Rows are sorted by adapter, so that the panels of each are read once per block of rows. Threads share blocks of rows
// x blocks of columns. No result depends on how: its integer sum is exact, and the rest concerns one element.
#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "int8_products.h"
#include "int8_rows_kernel.h"
#include "panel_linear.h"
#include "share.h"
#include "standard_arithmetic.h"

namespace ztok {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "int8_linear";
constexpr int64_t kBlockRows = 132;  // whole tiles of all kinds, and at a usual depth half of the second cache
constexpr int64_t kBlockPanels = 8;
constexpr double kInt8ProductsPerNanosecond = 200;  // for the number of threads alone

// The adapter of each row; empty: 0 for all.
std::vector<int32_t> adapters_of_rows(int64_t rows, int64_t num_adapters, const OptionalTensor& adapters,
                                      const OptionalTensor& cu_seqlens) {
  ZTOK_CHECK(adapters.has_value() || (num_adapters == 1 && !cu_seqlens.has_value()), kOp,
             "adapters: expected int32, because panels holds ", num_adapters, " adapters or cu_seqlens is given");
  if (!adapters.has_value()) return {};
  ZTOK_CHECK(adapters->dim() == 1 && adapters->scalar_type() == ScalarType::Int, kOp,
             "adapters: expected int32 [M], or [B] with cu_seqlens");
  const Tensor chosen = torch::stable::contiguous(*adapters);
  const int32_t* adapter = chosen.const_data_ptr<int32_t>();
  const int64_t count = chosen.size(0);
  for (int64_t i = 0; i < count; ++i) {
    ZTOK_CHECK(adapter[i] >= 0 && adapter[i] < num_adapters, kOp, "adapters: expected values in [0, ", num_adapters,
               "), got ", adapter[i]);
  }
  if (!cu_seqlens.has_value()) {
    ZTOK_CHECK(count == rows, kOp, "adapters: expected one for each of ", rows, " rows, got ", count);
    return {adapter, adapter + count};
  }
  ZTOK_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) == count + 1, kOp, "cu_seqlens: expected [", count + 1, "]");
  const bool wide = cu_seqlens->scalar_type() == ScalarType::Long;
  ZTOK_CHECK(wide || cu_seqlens->scalar_type() == ScalarType::Int, kOp, "cu_seqlens: expected int32 or int64");
  const Tensor offsets = torch::stable::contiguous(*cu_seqlens);
  const auto offset = [&](int64_t i) -> int64_t {
    return wide ? offsets.const_data_ptr<int64_t>()[i] : offsets.const_data_ptr<int32_t>()[i];
  };
  ZTOK_CHECK(offset(0) == 0 && offset(count) == rows, kOp, "cu_seqlens: expected 0 first and ", rows, " last, got ",
             offset(0), " and ", offset(count));
  for (int64_t i = 0; i < count; ++i) {
    ZTOK_CHECK(offset(i) <= offset(i + 1), kOp, "cu_seqlens: expected offsets that do not decrease");
  }
  std::vector<int32_t> result(rows);
  for (int64_t i = 0; i < count; ++i) std::fill(result.begin() + offset(i), result.begin() + offset(i + 1), adapter[i]);
  return result;
}

struct RowBlock {
  int64_t adapter, first, count;  // of the rows as they are sorted
};

Tensor int8_linear(const Tensor& x, const Tensor& panels, const Tensor& scales, int64_t out_features,
                   const OptionalTensor& bias, const OptionalTensor& adapters, const OptionalTensor& cu_seqlens) {
  ZTOK_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, kOp, "x: expected float32 [M, in]");
  const int64_t rows = x.size(0), width = x.size(1), depth = (width + kDepthStep - 1) / kDepthStep * kDepthStep;
  ZTOK_CHECK(panels.dim() == 5 && panels.scalar_type() == ScalarType::Byte && panels.size(2) == depth / 4 &&
                 panels.size(3) == kPanelColumns && panels.size(4) == 4,
             kOp, "panels: expected uint8 [n, panels, ", depth / 4, ", 16, 4] for rows of ", width);
  const int64_t num_adapters = panels.size(0), num_panels = panels.size(1), padded = num_panels * kPanelColumns;
  ZTOK_CHECK(scales.dim() == 2 && scales.scalar_type() == ScalarType::Float && scales.size(0) == num_adapters &&
                 scales.size(1) == padded,
             kOp, "scales: expected float32 [", num_adapters, ", ", padded, "]");
  const std::optional<Tensor> held = bias_of(kOp, bias, out_features, padded);
  const float* offsets = held.has_value() ? held->const_data_ptr<float>() : nullptr;
  const std::vector<int32_t> chosen = adapters_of_rows(rows, num_adapters, adapters, cu_seqlens);
  Tensor y = new_tensor(x, {rows, out_features});
  if (rows == 0 || out_features == 0) return y;

  std::vector<int64_t> order(rows), ends(num_adapters, 0);
  if (chosen.empty()) {
    std::iota(order.begin(), order.end(), 0);
    ends[0] = rows;
  } else {
    for (int32_t adapter : chosen) ++ends[adapter];
    std::partial_sum(ends.begin(), ends.end(), ends.begin());
    for (int64_t row = rows; row-- > 0;) order[--ends[chosen[row]]] = row;  // ends are beginnings now
    std::rotate(ends.begin(), ends.begin() + 1, ends.end());
    ends.back() = rows;
  }
  std::vector<RowBlock> blocks;
  for (int64_t adapter = 0, first = 0; adapter < num_adapters; first = ends[adapter++]) {
    for (int64_t row = first; row < ends[adapter]; row += kBlockRows) {
      blocks.push_back({adapter, row, std::min(kBlockRows, ends[adapter] - row)});
    }
  }

  const Tensor states = with_adjacent_elements(x), weights = torch::stable::contiguous(panels);
  const Tensor factors = torch::stable::contiguous(scales);
  const float* from = states.const_data_ptr<float>();
  const uint8_t* packed = weights.const_data_ptr<uint8_t>();
  const float* weight_scales = factors.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const int64_t stride = states.stride(0);
  const Buffer<int8_t> q(rows * depth);
  const Buffer<int32_t> row_sums(rows);
  const Buffer<float> row_scales(rows);
  share(rows, 16, static_cast<double>(rows) * width * 8 / kBytesPerNanosecond, [&](int64_t begin, int64_t end) {
    const StandardArithmetic standard;
    for (int64_t i = begin; i < end; ++i) {
      ZTOK_SELECT(quantize_rows)
      (from + order[i] * stride, stride, 1, width, q.get() + i * depth, depth, depth, row_sums.get() + i,
       row_scales.get() + i);
    }
  });
  const int64_t column_blocks = (num_panels + kBlockPanels - 1) / kBlockPanels;
  const double elements = static_cast<double>(depth) * padded;
  const double nanoseconds = std::max(rows * elements / kInt8ProductsPerNanosecond,
                                      static_cast<double>(blocks.size()) * elements / kBytesPerNanosecond);
  const Int8Products products = int8_products();
  share(static_cast<int64_t>(blocks.size()) * column_blocks, 4, nanoseconds, [&](int64_t begin, int64_t end) {
    const StandardArithmetic standard;
    for (int64_t item = begin; item < end; ++item) {
      const RowBlock& block = blocks[item / column_blocks];
      const int64_t panel = item % column_blocks * kBlockPanels, column = panel * kPanelColumns;
      const int64_t here = std::min(kBlockPanels, num_panels - panel), sums_stride = here * kPanelColumns;
      const Buffer<int32_t> sums(block.count * sums_stride);
      products(q.get() + block.first * depth, depth, block.count, row_sums.get() + block.first,
               packed + (block.adapter * padded + column) * depth, depth, here, sums.get(), sums_stride);
      for (int64_t i = 0; i < block.count; ++i) {
        ZTOK_SELECT(scale_sums)
        (sums.get() + i * sums_stride, sums_stride, 1, std::min(sums_stride, out_features - column),
         weight_scales + block.adapter * padded + column, row_scales.get() + block.first + i,
         offsets == nullptr ? nullptr : offsets + column, to + order[block.first + i] * out_features + column,
         out_features);
      }
    }
  });
  return y;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("int8_linear", TORCH_BOX(&ztok::int8_linear)); }
