#pragma once

#include <cstdint>

#include "isa.h"

namespace ztok {

enum class SumType : int { kFloat, kDouble, kHalf, kBFloat16 };

// out[c] = sum over k < count of rows[order[k] * row_stride + c], in order, for columns [begin, end).
ZTOK_KERNEL(void, ragged_sum_rows, SumType type, const void* rows, int64_t row_stride, const int64_t* order,
            int64_t count, int64_t begin, int64_t end, void* out)

}  // namespace ztok
