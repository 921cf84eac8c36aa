// Sums of exponentials of the scores of a block of codes. Included by kernel files only (see isa.h).
#pragma once

#include "score_layout.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {

// exp(x[i] - largest), summed: 2^n times a polynomial in what is left over, relative error below 2e-7.
inline float sum_of_exponentials(const float* x, int64_t count, float largest) {
  float terms[kBlockCodes];
  for (int64_t i = 0; i < kBlockCodes; ++i) {
    const float distance = i < count ? x[i] - largest : -100.0f;
    const float t = (distance > -86.0f ? distance : -86.0f) * 1.44269504f;
    const float shifted = t + 12582912.0f;  // 1.5 * 2^23: the integer part is in the low bits
    int32_t integer;
    __builtin_memcpy(&integer, &shifted, 4);
    const float f = t - (shifted - 12582912.0f);
    float p = 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    int32_t word;
    __builtin_memcpy(&word, &p, 4);
    word += integer << 23;
    __builtin_memcpy(&p, &word, 4);
    terms[i] = i < count ? p : 0.0f;
  }
  Vec sum = zeros();
  for (int i = 0; i < kBlockCodes; i += kWidth) sum = sum + load(terms + i);
  return reduce_add(sum);
}

}  // namespace ZTOK_ISA
}  // namespace ztok
