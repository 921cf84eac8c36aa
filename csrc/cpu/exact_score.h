// Scores in float64, the same to the last bit on every machine: eight partial sums in a fixed order, no fused
// operations. Included by kernel files only (see isa.h).
#pragma once

#include "score_layout.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {

constexpr int kLanes = 8;   // partial sums
constexpr int kChunk = 64;  // elements converted at a time

inline const float* floats_of(const float* p, int64_t, float*) { return p; }

template <typename T>
inline const float* floats_of(const T* p, int64_t count, float* buffer) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(buffer + i, load(p + i));
  if (i < count) store_first(buffer + i, load_first(p + i, static_cast<int>(count - i)), static_cast<int>(count - i));
  return buffer;
}

inline double total(const double (&sums)[kLanes]) {
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

inline double squared_norm(const float* x, int64_t width) {
  double sums[kLanes] = {};
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) {
    for (int i = 0; i < kLanes; ++i) sums[i] += static_cast<double>(x[k + i]) * x[k + i];
  }
  for (int i = 0; k + i < width; ++i) sums[i] += static_cast<double>(x[k + i]) * x[k + i];
  return total(sums);
}

// What a code is for a row: the nearest one minimises `value`, which is |x - c|^2, -x.c, or -x.c / |c| (0 for a code of
// zeros).
//
// In |x - c|^2 a row far longer than the codes leaves nothing of them: x - c is x. For a far code, one whose |x - c|^2
// is at least |x|^2 / 4, the part that depends on it is compared instead, |c|^2 / 2 - x.c, which is nowhere less exact
// than that. A code that is not far is nearer than any that is.
struct Score {
  double value;
  double compared;
  bool far;

  bool before(const Score& other) const { return far == other.far ? compared < other.compared : other.far; }
};

// `row_square` is |x|^2, which l2 needs.
template <typename T>
Score exact_score(const float* x, const T* code, int64_t width, Metric metric, double row_square) {
  float buffer[kChunk];
  double sums[kLanes] = {}, others[kLanes] = {};
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t depth = smaller(kChunk, width - first);
    const float *c = floats_of(code + first, depth, buffer), *row = x + first;
    const auto add = [&](int64_t k, int lane) __attribute__((always_inline)) {
      const double left = row[k], right = c[k];
      if (metric == Metric::l2) {
        sums[lane] += (left - right) * (left - right);
        others[lane] += right * (right / 2 - left);
      } else {
        sums[lane] += left * right;
        others[lane] += right * right;
      }
    };
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      for (int i = 0; i < kLanes; ++i) add(k + i, i);
    }
    for (int i = 0; k + i < depth; ++i) add(k + i, i);
  }
  const double sum = total(sums), other = total(others);
  if (metric == Metric::l2) {
    const bool far = sum >= row_square / 4;
    return {sum, far ? other : sum, far};
  }
  double value = -sum;
  if (metric == Metric::cosine) value = other > 0 ? value / __builtin_sqrt(other) : 0;
  return {value, value, false};
}

// The same for a code of a matrix.
inline Score exact_score(const float* x, const Matrix& codes, int64_t code, Metric metric, double row_square) {
  const int64_t offset = code * codes.stride;
  switch (codes.element) {
    case Element::float16:
      return exact_score(x, static_cast<const Half*>(codes.data) + offset, codes.width, metric, row_square);
    case Element::bfloat16:
      return exact_score(x, static_cast<const BFloat16*>(codes.data) + offset, codes.width, metric, row_square);
    default:
      return exact_score(x, static_cast<const float*>(codes.data) + offset, codes.width, metric, row_square);
  }
}

inline double exact_dot(const float* x, const Matrix& codes, int64_t code) {
  return -exact_score(x, codes, code, Metric::dot, 0).value;
}

}  // namespace ZTOK_ISA
}  // namespace ztok
