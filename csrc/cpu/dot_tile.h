// Scores of a few rows with codes that are read where they lie, without packing: each pair is one sum over the width in
// vector lanes, the same whatever rows and codes are computed beside it. Included by kernel files only (see isa.h).
#pragma once

#include "score_layout.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {

constexpr int kDotCodes = 8;  // codes that stay in L1 while all rows pass by

// scores[r * kBlockCodes + c] = x[r] . codes[c]
template <int kRows, int kCodes, typename T>
inline __attribute__((always_inline)) void dots(const float* x, const T* codes, int64_t stride, int64_t width,
                                                float* scores) {
  Vec sums[kRows][kCodes];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCodes; ++c) sums[r][c] = zeros();
  }
  int64_t k = 0;
  for (; k + kWidth <= width; k += kWidth) {
    Vec values[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) values[r] = load(x + r * width + k);
#pragma GCC unroll 8
    for (int c = 0; c < kCodes; ++c) {
      const Vec code = load(codes + c * stride + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][c] = fma(values[r], code, sums[r][c]);
    }
  }
  if (k < width) {
    const int rest = static_cast<int>(width - k);
#pragma GCC unroll 8
    for (int c = 0; c < kCodes; ++c) {
      const Vec code = load_first(codes + c * stride + k, rest);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][c] = fma(load_first(x + r * width + k, rest), code, sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kCodes; ++c) scores[r * kBlockCodes + c] = reduce_add(sums[r][c]);
  }
}

template <int kCodes, typename T>
inline void dots_of_rows(const float* x, int64_t rows, const T* codes, int64_t stride, int64_t width, float* scores) {
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) dots<3, kCodes>(x + r * width, codes, stride, width, scores + r * kBlockCodes);
  if (r + 2 <= rows) {
    dots<2, kCodes>(x + r * width, codes, stride, width, scores + r * kBlockCodes);
  } else if (r < rows) {
    dots<1, kCodes>(x + r * width, codes, stride, width, scores + r * kBlockCodes);
  }
}

// scores [rows, kBlockCodes] of up to kBlockCodes codes, and the squares of the codes' lengths.
template <typename T>
void dot_block(const float* x, int64_t rows, const T* codes, int64_t stride, int64_t count, int64_t width,
               float* scores, float* squares) {
  for (int64_t first = 0; first < count; first += kDotCodes, codes += kDotCodes * stride) {
    const int64_t present = smaller(kDotCodes, count - first);
    for (int64_t c = 0; c < present; ++c) {
      const T* code = codes + c * stride;
      Vec sum = zeros(), other = zeros();
      int64_t k = 0;
      for (; k + 2 * kWidth <= width; k += 2 * kWidth) {
        const Vec left = load(code + k), right = load(code + k + kWidth);
        sum = fma(left, left, sum);
        other = fma(right, right, other);
      }
      for (; k < width; k += kWidth) {
        const Vec last = load_first(code + k, static_cast<int>(smaller(kWidth, width - k)));
        sum = fma(last, last, sum);
      }
      squares[first + c] = reduce_add(sum + other);
    }
    int64_t c = 0;
    if (rows == 1 && present == kDotCodes) {
      dots<1, kDotCodes>(x, codes, stride, width, scores + first);
      continue;
    }
    for (; c + 4 <= present; c += 4) dots_of_rows<4>(x, rows, codes + c * stride, stride, width, scores + first + c);
    for (; c < present; ++c) dots_of_rows<1>(x, rows, codes + c * stride, stride, width, scores + first + c);
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
