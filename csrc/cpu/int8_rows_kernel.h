// Rows of floats as int8 with a scale each (docs/determinism.md), once per instruction set (see isa.h).
#pragma once

#include <cstdint>

#include "isa.h"

namespace ztok {

// q[r * q_stride + k] for k < depth, of which the elements from `width` on are 0; sums[r] is the sum of row r of q;
// scales[r] is 0 for a row below 2^-100 and NaN for one that is not finite.
ZTOK_KERNEL(void, quantize_rows, const float* rows, int64_t row_stride, int64_t count, int64_t width, int8_t* q,
            int64_t q_stride, int64_t depth, int32_t* sums, float* scales)

// out[r * out_stride + c] = (float(sums[r * sums_stride + c]) * weight_scales[c]) * row_scales[r], + bias[c] unless it
// is null, for c < columns.
ZTOK_KERNEL(void, scale_sums, const int32_t* sums, int64_t sums_stride, int64_t count, int64_t columns,
            const float* weight_scales, const float* row_scales, const float* bias, float* out, int64_t out_stride)

}  // namespace ztok
