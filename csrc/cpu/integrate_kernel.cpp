#include "integrate_kernel.h"

#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

// Vectors that one pass over a unit's rows keeps in registers.
constexpr int kBlock = 8;

template <typename T>
inline Vec load_some(const T* p, int n) {
  return n == kWidth ? load(p) : load_first(p, n);
}

template <typename T>
inline void store_some(T* p, Vec v, int n) {
  n == kWidth ? store(p, v) : store_first(p, v, n);
}

inline int lanes_left(int64_t column, int64_t width) {
  return width - column < kWidth ? static_cast<int>(width - column) : kWidth;
}

template <typename T, typename M>
void unit_mean(const T* rows, int64_t width, const float* weights, UnitRows unit, M* mean) {
  // weight(-1) is what the row before the unit carries into it
  const auto weight = [&](int64_t i) { return i < 0 ? weights[2 * unit.begin - 1] : weights[2 * (unit.begin + i)]; };
  const T* origin = rows + unit.begin * width;
  const int64_t first = unit.carried ? -1 : 0, last = unit.end - unit.begin;
  float total = 0;
  for (int64_t i = first; i < last; ++i) total += weight(i);
  const bool empty = !(total > 0);
  const Vec divisor = broadcast(total);
  int64_t column = 0;
  for (; column + kBlock * kWidth <= width; column += kBlock * kWidth) {
    Vec sums[kBlock];
    for (int v = 0; v < kBlock; ++v) sums[v] = zeros();
    for (int64_t i = empty ? last : first; i < last; ++i) {
      const T* row = origin + i * width + column;
      const Vec w = broadcast(weight(i));
      for (int v = 0; v < kBlock; ++v) sums[v] = fma(w, load(row + v * kWidth), sums[v]);
    }
    // a division, not a product with the reciprocal: the mean of equal rows is exactly that row
    for (int v = 0; v < kBlock; ++v) store(mean + column + v * kWidth, empty ? sums[v] : sums[v] / divisor);
  }
  for (; column < width; column += kWidth) {
    const int n = lanes_left(column, width);
    Vec sum = zeros();
    for (int64_t i = empty ? last : first; i < last; ++i) {
      sum = fma(broadcast(weight(i)), load_some(origin + i * width + column, n), sum);
    }
    store_some(mean + column, empty ? sum : sum / divisor, n);
  }
}

template <typename T, typename M>
void row_gradient(const T* row, int64_t width, const ShareGradient& own, const ShareGradient& carried,
                  const float* added, T* grad_row) {
  const ShareGradient* shares[2] = {&own, &carried};
  Vec dots[2] = {zeros(), zeros()};
  for (int64_t column = 0; column < width; column += kWidth) {
    const int n = lanes_left(column, width);
    const Vec value = load_some(row + column, n);
    Vec sum = added ? load_some(added + column, n) : zeros();
    for (int s = 0; s < 2; ++s) {
      if (!shares[s]->mean) continue;
      const Vec grad = load_some(static_cast<const M*>(shares[s]->grad) + column, n);
      const Vec mean = load_some(static_cast<const M*>(shares[s]->mean) + column, n);
      sum = fma(broadcast(shares[s]->weight * shares[s]->inverse), grad, sum);
      dots[s] = fma(grad, value - mean, dots[s]);
    }
    store_some(grad_row + column, sum, n);
  }
  for (int s = 0; s < 2; ++s) {
    *shares[s]->grad_weight = shares[s]->mean ? shares[s]->inverse * reduce_add(dots[s]) : 0.0f;
  }
}

using f32 = float;
using f16 = Half;
using bf16 = BFloat16;

}  // namespace

#define ZTOK_DEFINE(rows_, mean_)                                                                                      \
  void unit_mean_##rows_##_##mean_(const void* rows, int64_t width, const float* weights, UnitRows unit, void* mean) { \
    unit_mean(static_cast<const rows_*>(rows), width, weights, unit, static_cast<mean_*>(mean));                       \
  }                                                                                                                    \
  void row_gradient_##rows_##_##mean_(const void* row, int64_t width, const ShareGradient* own,                        \
                                      const ShareGradient* carried, const float* added, void* grad_row) {              \
    row_gradient<rows_, mean_>(static_cast<const rows_*>(row), width, *own, *carried, added,                           \
                               static_cast<rows_*>(grad_row));                                                         \
  }
ZTOK_DEFINE(f32, f32)
ZTOK_DEFINE(f16, f16)
ZTOK_DEFINE(bf16, bf16)
ZTOK_DEFINE(f16, f32)
ZTOK_DEFINE(bf16, f32)
#undef ZTOK_DEFINE

}  // namespace ZTOK_ISA
}  // namespace ztok
