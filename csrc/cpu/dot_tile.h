// Scores of a few rows with codes that are read where they lie, without packing: each pair is one sum over the width in
// vector lanes, the same whatever rows and codes are computed beside it. Included by kernel files only (see isa.h).
#pragma once

#include "score_layout.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {

constexpr int kDotCodes = 8;  // codes that stay in L1 while all rows pass by

// Elements of a code from k on, less those of the centre.
template <bool kCentre, typename T>
inline __attribute__((always_inline)) Vec element(const T* code, const float* centre, int64_t k) {
  if constexpr (kCentre) return load(code + k) - load(centre + k);
  return load(code + k);
}

template <bool kCentre, typename T>
inline __attribute__((always_inline)) Vec last_elements(const T* code, const float* centre, int64_t k, int rest) {
  if constexpr (kCentre) return load_first(code + k, rest) - load_first(centre + k, rest);
  return load_first(code + k, rest);
}

// scores[r * kBlockCodes + c] = x[r] . codes[c]
template <bool kCentre, int kRows, int kCodes, typename T>
inline __attribute__((always_inline)) void dots(const float* x, const T* codes, int64_t stride, int64_t width,
                                                const float* centre, float* scores) {
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
      const Vec code = element<kCentre>(codes + c * stride, centre, k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][c] = fma(values[r], code, sums[r][c]);
    }
  }
  if (k < width) {
    const int rest = static_cast<int>(width - k);
#pragma GCC unroll 8
    for (int c = 0; c < kCodes; ++c) {
      const Vec code = last_elements<kCentre>(codes + c * stride, centre, k, rest);
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

template <bool kCentre, int kCodes, typename T>
inline void dots_of_rows(const float* x, int64_t rows, const T* codes, int64_t stride, int64_t width,
                         const float* centre, float* scores) {
  int64_t r = 0;
  for (; r + 3 <= rows; r += 3) {
    dots<kCentre, 3, kCodes>(x + r * width, codes, stride, width, centre, scores + r * kBlockCodes);
  }
  if (r + 2 <= rows) {
    dots<kCentre, 2, kCodes>(x + r * width, codes, stride, width, centre, scores + r * kBlockCodes);
  } else if (r < rows) {
    dots<kCentre, 1, kCodes>(x + r * width, codes, stride, width, centre, scores + r * kBlockCodes);
  }
}

// scores [rows, kBlockCodes] of up to kBlockCodes codes, and the squares of the codes' lengths. With kCentre the codes
// are taken less `centre` [width]; the rows x are given as they are to be multiplied.
template <bool kCentre, typename T>
void dot_block(const float* x, int64_t rows, const T* codes, int64_t stride, int64_t count, int64_t width,
               const float* centre, float* scores, float* squares) {
  for (int64_t first = 0; first < count; first += kDotCodes, codes += kDotCodes * stride) {
    const int64_t present = smaller(kDotCodes, count - first);
    for (int64_t c = 0; c < present; ++c) {
      const T* code = codes + c * stride;
      Vec sum = zeros(), other = zeros();
      int64_t k = 0;
      for (; k + 2 * kWidth <= width; k += 2 * kWidth) {
        const Vec left = element<kCentre>(code, centre, k), right = element<kCentre>(code, centre, k + kWidth);
        sum = fma(left, left, sum);
        other = fma(right, right, other);
      }
      for (; k < width; k += kWidth) {
        const Vec last = last_elements<kCentre>(code, centre, k, static_cast<int>(smaller(kWidth, width - k)));
        sum = fma(last, last, sum);
      }
      squares[first + c] = reduce_add(sum + other);
    }
    int64_t c = 0;
    if (rows == 1 && present == kDotCodes) {
      dots<kCentre, 1, kDotCodes>(x, codes, stride, width, centre, scores + first);
      continue;
    }
    for (; c + 4 <= present; c += 4) {
      dots_of_rows<kCentre, 4>(x, rows, codes + c * stride, stride, width, centre, scores + first + c);
    }
    for (; c < present; ++c) {
      dots_of_rows<kCentre, 1>(x, rows, codes + c * stride, stride, width, centre, scores + first + c);
    }
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
