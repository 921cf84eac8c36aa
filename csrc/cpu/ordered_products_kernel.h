// Float32 products summed in one order (docs/determinism.md), once per instruction set (see isa.h).
#pragma once

#include <cstdint>

#include "isa.h"

namespace ztok {

// out[r * out_stride + c] = sum over k, rising, by fma from 0, of rows[r * row_stride + k] * weight[c][k],
// for r < count and c < num_panels * 16; panels float32 [num_panels, depth, 16].
ZTOK_KERNEL(void, ordered_products, const float* rows, int64_t row_stride, int64_t count, const float* panels,
            int64_t depth, int64_t num_panels, float* out, int64_t out_stride)

}  // namespace ztok
