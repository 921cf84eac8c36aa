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

// No vector with one of these sums of squares is longer; infinity if float32 cannot hold them, or one is not finite.
inline float longest_of(const float* squares, int64_t count, int64_t width) {
  float largest = 0, sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (squares[i] > largest) largest = squares[i];
    sum += squares[i];  // a maximum alone loses NaN
  }
  return sum < __builtin_inff() ? length_bound(largest, width) : __builtin_inff();
}

}  // namespace ZTOK_ISA
}  // namespace ztok
