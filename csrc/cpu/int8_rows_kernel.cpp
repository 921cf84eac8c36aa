#include "int8_rows_kernel.h"

#include <cstring>

namespace ztok {
namespace ZTOK_ISA {
namespace {

// Plain loops, which the compiler vectorises: every element is rounded by itself, and integers add up in any order.

constexpr float kRounder = 12582912;  // 3 * 2^22: adding it rounds to an integer, ties to even, in the low bits
constexpr int32_t kInfinity = 0x7f800000;

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace

void quantize_rows(const float* rows, int64_t row_stride, int64_t count, int64_t width, int8_t* q, int64_t q_stride,
                   int64_t depth, int32_t* sums, float* scales) {
  for (int64_t r = 0; r < count; ++r) {
    const float* x = rows + r * row_stride;
    int8_t* to = q + r * q_stride;
    // Bits of absolute values are in the order of the values, with infinity and then NaN above all others.
    int32_t most = 0;
    for (int64_t k = 0; k < width; ++k) {
      const int32_t magnitude = bits_of(x[k]) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    sums[r] = 0;
    const float largest = float_of(most);
    if (most >= kInfinity || largest < 0x1p-100f) {
      std::memset(to, 0, static_cast<size_t>(depth));
      scales[r] = most >= kInfinity ? __builtin_nanf("") : 0.0f;
      continue;
    }
    const float factor = 127.0f / largest;
    int32_t sum = 0;
    for (int64_t k = 0; k < width; ++k) {
      const int32_t value = bits_of(x[k] * factor + kRounder) - bits_of(kRounder);
      to[k] = static_cast<int8_t>(value);
      sum += value;
    }
    std::memset(to + width, 0, static_cast<size_t>(depth - width));
    sums[r] = sum;
    scales[r] = largest / 127.0f;
  }
}

void scale_sums(const int32_t* sums, int64_t sums_stride, int64_t count, int64_t columns, const float* weight_scales,
                const float* row_scales, const float* bias, float* out, int64_t out_stride) {
  for (int64_t r = 0; r < count; ++r) {
    const int32_t* from = sums + r * sums_stride;
    float* to = out + r * out_stride;
    const float scale = row_scales[r];
    if (bias == nullptr) {
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<float>(from[c]) * weight_scales[c] * scale;
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<float>(from[c]) * weight_scales[c] * scale + bias[c];
    }
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
