// Units of rows on the CPU, for integrate.cpp and quantize_ragged.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "integrate_kernel.h"
#include "new_tensor.h"
#include "ragged.h"

namespace ztok {

// What the loops over units need to know of them. unit [rows] and cu_units [sequences + 1] as halting_units gives them.
struct UnitTable {
  const int32_t* unit;
  const int32_t* cu_units;
  int64_t sequences;
  int64_t rows;
  int64_t capacity;  // units from here on are left out
};

// visit(k, UnitRows) for every unit whose first row lies in [row_begin, row_end).
template <typename Visit>
void for_each_unit(const UnitTable& table, int64_t row_begin, int64_t row_end, const Visit& visit) {
  const int32_t* offsets = table.cu_units;
  const int32_t* offsets_end = offsets + table.sequences + 1;
  int64_t row = row_begin;
  while (row < row_end) {
    const int32_t k = table.unit[row];
    if (k < 0 || k >= table.capacity || (row > 0 && table.unit[row - 1] == k)) {
      ++row;
      continue;
    }
    int64_t end = row + 1;
    while (end < table.rows && table.unit[end] == k) ++end;
    // every unit but the first of its sequence gets what the row before it carries
    offsets = std::lower_bound(offsets, offsets_end, k);
    const bool first_of_sequence = offsets != offsets_end && *offsets == k;
    visit(static_cast<int64_t>(k), UnitRows{row, end, row > 0 && !first_of_sequence});
    row = end;
  }
}

// Runs work(begin, end) over ranges of rows, in threads; a task is some 64 KiB of rows.
template <typename Work>
void for_row_ranges(int64_t rows, int64_t row_bytes, const Work& work) {
  constexpr int64_t kBytesPerTask = 64 * 1024;
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(row_bytes, 1)), work);
}

// The sum of weights of a unit, in the order in which its mean is accumulated.
template <typename Weight>
Weight sum_of_weights(const Weight* weights, const UnitRows& unit) {
  Weight total = unit.carried ? weights[2 * unit.begin - 1] : Weight(0);
  for (int64_t row = unit.begin; row < unit.end; ++row) total += weights[2 * row];
  return total;
}

// The kernels for rows of a dtype (float32, float16 or bfloat16) and means of the same dtype or of float32.
using UnitMean = void (*)(const void* rows, int64_t width, const float* weights, UnitRows unit, void* mean);
using RowGradient = void (*)(const void* row, int64_t width, const ShareGradient* own, const ShareGradient* carried,
                             const float* added, void* grad_row);
UnitMean unit_mean_kernel(const char* op, ScalarType rows, ScalarType means);
RowGradient row_gradient_kernel(const char* op, ScalarType rows, ScalarType means);

// The tensors of an op over units: rows [T, D], weights [T, 2], unit [T] and cu_units [B + 1], contiguous. Weights are
// float32, and float64 with the rows if one of the two is; unit and cu_units are int32, cu_units starts at 0 and does
// not decrease.
struct UnitTensors {
  Tensor rows, weights, unit, cu_units;

  UnitTable table(int64_t capacity) const;
  int64_t units() const;  // how many there are
};
UnitTensors unit_tensors(const char* op, const Tensor& rows, const Tensor& weights, const Tensor& unit,
                         const Tensor& cu_units);
// Fails unless a result has a row for every unit.
void check_total_units(const char* op, const UnitTensors& tensors, int64_t total_units);

// Gradients of rows [T, D] and weights [T, 2] from that of the means [K, D], both contiguous and float32 or of the
// dtype of the rows. grad_end_rows [K, D], float, or null: what is added to the gradient of the row that ends each
// unit.
struct IntegrationGradient {
  Tensor rows, weights;
};
IntegrationGradient integration_gradient(const char* op, const UnitTensors& tensors, const Tensor& means,
                                         const Tensor& grad, const float* grad_end_rows);

inline Tensor as_dtype(const Tensor& tensor, ScalarType type) {
  return as_contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

}  // namespace ztok
