// Sums of chosen codes, one version per instruction set.
#pragma once

#include "isa.h"
#include "score_layout.h"

namespace ztok {

// Rows [begin, end) of `sums`, in its element format: the sum over levels of the row's codes, added in float32 in their
// order; a code of -1 adds nothing. `book` is the first level, the others follow `level_stride` elements apart.
ZTOK_KERNEL(void, sum_codes, const Matrix& book, int64_t levels, int64_t level_stride, const int32_t* codes,
            int64_t begin, int64_t end, void* sums, Element sums_element)

}  // namespace ztok
