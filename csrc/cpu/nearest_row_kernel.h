// Nearest code of a single row by squared distance, one version per instruction set; nearest_row.cpp drives it.
#pragma once

#include "isa.h"
#include "score_layout.h"

namespace ztok {

// distances[code] = |row - code|^2 in float32 for codes [begin, end). Returns the least of them; NaN or infinity if one
// of them is not finite.
ZTOK_KERNEL(float, row_distances, const float* row, const Matrix& codes, int64_t begin, int64_t end, float* distances)

struct NearestCode {
  int32_t code;
  double distance;
};

// The code with the least float64 distance, the lowest among equals, of those whose float32 distance is at most
// `threshold`; then takes it off the row.
ZTOK_KERNEL(NearestCode, rerank_row, float* row, const Matrix& codes, const float* distances, float threshold)

// The squared length of a row in float64.
ZTOK_KERNEL(double, row_square, const float* row, int64_t width)

}  // namespace ztok
