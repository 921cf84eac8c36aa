// Lengths of vectors in float32, from above. Included by kernel files only (see isa.h).
#pragma once

#include "score_layout.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {

constexpr float kUnit = 0x1p-24f;  // float32's unit roundoff

// The length of a vector whose squares were summed in float32, plus what that may have lost to rounding and, element by
// element, to underflow.
inline float length_bound(float square, int64_t width) {
  const float n = static_cast<float>(width);
  return __builtin_sqrtf(square) * (1 + (n + 16) * kUnit) + __builtin_sqrtf(n) * 0x1p-63f;
}

inline float sum_of_squares(const float* x, int64_t width) {
  Vec sum = zeros(), other = zeros();
  int64_t k = 0;
  for (; k + 2 * kWidth <= width; k += 2 * kWidth) {
    const Vec left = load(x + k), right = load(x + k + kWidth);
    sum = fma(left, left, sum);
    other = fma(right, right, other);
  }
  for (; k < width; k += kWidth) {
    const Vec rest = load_first(x + k, static_cast<int>(smaller(kWidth, width - k)));
    sum = fma(rest, rest, sum);
  }
  return reduce_add(sum + other);
}

}  // namespace ZTOK_ISA
}  // namespace ztok
