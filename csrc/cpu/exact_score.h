// Distances in float64, the same to the last bit on every machine: eight partial sums in a fixed order, no fused
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

// What the nearest code minimises: |x - c|^2, -x.c, or -x.c / |c|, which is 0 for a code of zeros.
template <typename T>
double exact_score(const float* x, const T* code, int64_t width, Metric metric) {
  float buffer[kChunk];
  double sums[kLanes] = {}, squares[kLanes] = {};
  for (int64_t first = 0; first < width; first += kChunk) {
    const int64_t depth = smaller(kChunk, width - first);
    const float* c = floats_of(code + first, depth, buffer);
    int64_t k = 0;
    if (metric == Metric::l2) {
      for (; k + kLanes <= depth; k += kLanes) {
        for (int i = 0; i < kLanes; ++i) {
          const double difference = static_cast<double>(x[first + k + i]) - c[k + i];
          sums[i] += difference * difference;
        }
      }
      for (int i = 0; k + i < depth; ++i) {
        const double difference = static_cast<double>(x[first + k + i]) - c[k + i];
        sums[i] += difference * difference;
      }
    } else {
      for (; k + kLanes <= depth; k += kLanes) {
        for (int i = 0; i < kLanes; ++i) {
          sums[i] += static_cast<double>(x[first + k + i]) * c[k + i];
          squares[i] += static_cast<double>(c[k + i]) * c[k + i];
        }
      }
      for (int i = 0; k + i < depth; ++i) {
        sums[i] += static_cast<double>(x[first + k + i]) * c[k + i];
        squares[i] += static_cast<double>(c[k + i]) * c[k + i];
      }
    }
  }
  const double sum = total(sums);
  if (metric == Metric::l2) return sum;
  if (metric == Metric::dot) return -sum;
  const double square = total(squares);
  return square > 0 ? -sum / __builtin_sqrt(square) : 0;
}

// The same for a code of a matrix.
inline double exact_score(const float* x, const Matrix& codes, int64_t code, Metric metric) {
  const int64_t offset = code * codes.stride;
  switch (codes.element) {
    case Element::float16:
      return exact_score(x, static_cast<const Half*>(codes.data) + offset, codes.width, metric);
    case Element::bfloat16:
      return exact_score(x, static_cast<const BFloat16*>(codes.data) + offset, codes.width, metric);
    default:
      return exact_score(x, static_cast<const float*>(codes.data) + offset, codes.width, metric);
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
