// ordered_linear on the CPU: float32 products summed in one order (docs/determinism.md). Threads share blocks of rows x
// blocks of columns; an element is one chain of fma, whoever computes it.
#include <algorithm>
#include <optional>

#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "ordered_products_kernel.h"
#include "panel_linear.h"
#include "share.h"
#include "standard_arithmetic.h"

namespace ztok {
namespace {

constexpr const char* kOp = "ordered_linear";
constexpr int64_t kBlockRows = 96, kBlockPanels = 8;

Tensor ordered_linear(const Tensor& x, const Tensor& panels, int64_t out_features, const std::optional<Tensor>& bias) {
  ZTOK_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, kOp, "x: expected float32 [M, in]");
  const int64_t rows = x.size(0), depth = x.size(1);
  ZTOK_CHECK(panels.dim() == 3 && panels.scalar_type() == ScalarType::Float && panels.size(1) == depth &&
                 panels.size(2) == kPanelColumns,
             kOp, "panels: expected float32 [panels, ", depth, ", 16]");
  const int64_t num_panels = panels.size(0), padded = num_panels * kPanelColumns;
  const std::optional<Tensor> held = bias_of(kOp, bias, out_features, padded);
  const float* offsets = held.has_value() ? held->const_data_ptr<float>() : nullptr;
  Tensor y = new_tensor(x, {rows, out_features});
  if (rows == 0 || out_features == 0) return y;
  const Tensor states = with_adjacent_elements(x), weights = torch::stable::contiguous(panels);
  const float *from = states.const_data_ptr<float>(), *packed = weights.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const int64_t stride = states.stride(0);
  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  const int64_t column_blocks = (num_panels + kBlockPanels - 1) / kBlockPanels;
  const double elements = static_cast<double>(depth) * padded;
  const double nanoseconds = std::max(rows * elements / kProductsPerNanosecond, 4 * elements / kBytesPerNanosecond);
  share(row_blocks * column_blocks, 4, nanoseconds, [&](int64_t begin, int64_t end) {
    const StandardArithmetic standard;
    const Buffer<float> block(std::min(kBlockRows, rows) * kBlockPanels * kPanelColumns);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / column_blocks * kBlockRows, count = std::min(kBlockRows, rows - row);
      const int64_t panel = item % column_blocks * kBlockPanels, column = panel * kPanelColumns;
      const int64_t here = std::min(kBlockPanels, num_panels - panel), width = here * kPanelColumns;
      ZTOK_SELECT(ordered_products)
      (from + row * stride, stride, count, packed + column * depth, depth, here, block.get(), width);
      const int64_t columns = std::min(width, out_features - column);
      for (int64_t i = 0; i < count; ++i) {
        const float* sums = block.get() + i * width;
        float* target = to + (row + i) * out_features + column;
        for (int64_t c = 0; c < columns; ++c) target[c] = offsets == nullptr ? sums[c] : sums[c] + offsets[column + c];
      }
    }
  });
  return y;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("ordered_linear", TORCH_BOX(&ztok::ordered_linear)); }
