// Sums of rows, one vector at a time; see ragged_sum_kernel.h.
#include "ragged_sum_kernel.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

// Columns of one pass over the rows: eight vectors of sums stay in registers.
constexpr int kVectors = 8;

template <typename T, int kCount>
void sum_vectors(const T* rows, int64_t row_stride, const int64_t* order, int64_t count, T* out) {
  Vec sums[kCount];
  for (int v = 0; v < kCount; ++v) sums[v] = load(rows + order[0] * row_stride + v * kWidth);
  for (int64_t k = 1; k < count; ++k) {
    const T* row = rows + order[k] * row_stride;
    for (int v = 0; v < kCount; ++v) sums[v] += load(row + v * kWidth);
  }
  for (int v = 0; v < kCount; ++v) store(out + v * kWidth, sums[v]);
}

template <typename T>
void sum_floats(const T* rows, int64_t row_stride, const int64_t* order, int64_t count, int64_t begin, int64_t end,
                T* out) {
  int64_t column = begin;
  for (; column + kVectors * kWidth <= end; column += kVectors * kWidth) {
    sum_vectors<T, kVectors>(rows + column, row_stride, order, count, out + column);
  }
  for (; column + kWidth <= end; column += kWidth) {
    sum_vectors<T, 1>(rows + column, row_stride, order, count, out + column);
  }
  const int left = static_cast<int>(end - column);
  if (left == 0) return;
  Vec sum = load_first(rows + order[0] * row_stride + column, left);
  for (int64_t k = 1; k < count; ++k) sum += load_first(rows + order[k] * row_stride + column, left);
  store_first(out + column, sum, left);
}

void sum_doubles(const double* rows, int64_t row_stride, const int64_t* order, int64_t count, int64_t begin,
                 int64_t end, double* out) {
  for (int64_t c = begin; c < end; ++c) out[c] = rows[order[0] * row_stride + c];
  for (int64_t k = 1; k < count; ++k) {
    const double* row = rows + order[k] * row_stride;
    for (int64_t c = begin; c < end; ++c) out[c] += row[c];
  }
}

}  // namespace

void ragged_sum_rows(SumType type, const void* rows, int64_t row_stride, const int64_t* order, int64_t count,
                     int64_t begin, int64_t end, void* out) {
  switch (type) {
    case SumType::kFloat:
      return sum_floats(static_cast<const float*>(rows), row_stride, order, count, begin, end,
                        static_cast<float*>(out));
    case SumType::kHalf:
      return sum_floats(static_cast<const Half*>(rows), row_stride, order, count, begin, end, static_cast<Half*>(out));
    case SumType::kBFloat16:
      return sum_floats(static_cast<const BFloat16*>(rows), row_stride, order, count, begin, end,
                        static_cast<BFloat16*>(out));
    case SumType::kDouble:
      return sum_doubles(static_cast<const double*>(rows), row_stride, order, count, begin, end,
                         static_cast<double*>(out));
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
