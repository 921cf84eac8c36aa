// Weighted means of units and their gradients, one unit or one row at a time. The suffixes name the formats: of the
// rows, then of the means (or of the gradients of the means); a mean is always accumulated in float.
#pragma once

#include "isa.h"

namespace ztok {

// The rows [begin, end) of a packed matrix that a unit owns, and whether row begin - 1 carries its remainder into it.
// weights [rows, 2]: the share of a row in its own unit and the share that it carries.
struct UnitRows {
  int64_t begin;
  int64_t end;
  bool carried;
};

// mean [width] = sum of weight * row / sum of weights; zeros where the weights do not add up to more than 0.
#define ZTOK_UNIT_MEAN(rows_, mean_)                                                                                   \
  ZTOK_KERNEL(void, unit_mean_##rows_##_##mean_, const void* rows, int64_t width, const float* weights, UnitRows unit, \
              void* mean)
ZTOK_UNIT_MEAN(f32, f32)
ZTOK_UNIT_MEAN(f16, f16)
ZTOK_UNIT_MEAN(bf16, bf16)
ZTOK_UNIT_MEAN(f16, f32)
ZTOK_UNIT_MEAN(bf16, f32)
#undef ZTOK_UNIT_MEAN

// One of the two units that a row may have a share in.
struct ShareGradient {
  const void* mean;  // [width]; null where the row has no such unit or the unit no weight: its gradients are 0
  const void* grad;  // [width], of the mean
  float weight;      // the row's share
  float inverse;     // 1 / the unit's sum of weights
  float* grad_weight;
};

// grad_row [width] = sum over both shares of weight * inverse * grad, + added (float [width]; null for none);
// *grad_weight = inverse * <grad, row - mean> for each.
#define ZTOK_ROW_GRADIENT(rows_, mean_)                                                                       \
  ZTOK_KERNEL(void, row_gradient_##rows_##_##mean_, const void* row, int64_t width, const ShareGradient* own, \
              const ShareGradient* carried, const float* added, void* grad_row)
ZTOK_ROW_GRADIENT(f32, f32)
ZTOK_ROW_GRADIENT(f16, f16)
ZTOK_ROW_GRADIENT(bf16, bf16)
ZTOK_ROW_GRADIENT(f16, f32)
ZTOK_ROW_GRADIENT(bf16, f32)
#undef ZTOK_ROW_GRADIENT

}  // namespace ztok
