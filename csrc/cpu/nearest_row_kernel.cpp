// One row against codes as they lie in memory: a single pass over the codes at the rate at which memory gives them,
// then a look at the few whose float32 distance cannot be told from the least.
#include "nearest_row_kernel.h"

#include "exact_score.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

constexpr int64_t kAhead = 1024;  // bytes that are asked for before they are needed

// Asks for what is read once a call and should not drive the caller's own data out of the caches.
template <typename T>
inline void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead, 0, 0);
}

template <typename T>
inline __attribute__((always_inline)) Vec squared_differences(const float* row, const T* code, int64_t width) {
  Vec sum = zeros(), other = zeros();
  int64_t k = 0;
  for (; k + 2 * kWidth <= width; k += 2 * kWidth) {
    prefetch(code + k);
    prefetch(code + k + kWidth);
    const Vec left = load(row + k) - load(code + k), right = load(row + k + kWidth) - load(code + k + kWidth);
    sum = fma(left, left, sum);
    other = fma(right, right, other);
  }
  for (; k < width; k += kWidth) {
    const int rest = static_cast<int>(smaller(kWidth, width - k));
    const Vec last = load_first(row + k, rest) - load_first(code + k, rest);
    sum = fma(last, last, sum);
  }
  return sum + other;
}

// As above for a row of so many whole vectors, which stay in registers from code to code.
template <int vectors, typename T>
inline __attribute__((always_inline)) Vec squared_differences(const Vec* row, const T* code) {
  Vec sum = zeros(), other = zeros();
#pragma GCC unroll 8
  for (int k = 0; k < vectors; k += 2) {
    prefetch(code + k * kWidth);
    const Vec left = row[k] - load(code + k * kWidth);
    sum = fma(left, left, sum);
    if (k + 1 == vectors) break;
    prefetch(code + (k + 1) * kWidth);
    const Vec right = row[k + 1] - load(code + (k + 1) * kWidth);
    other = fma(right, right, other);
  }
  return sum + other;
}

// The vectors of a row that registers have room for, else 0.
constexpr int held(int width) { return width / kWidth <= 8 ? width / kWidth : 0; }

// `vectors`: those that are held in registers, or 0.
template <int vectors, typename T>
float distances_from(const float* row, const T* book, const Matrix& codes, int64_t begin, int64_t end,
                     float* distances) {
  Vec whole[vectors > 0 ? vectors : 1];
#pragma GCC unroll 8
  for (int k = 0; k < vectors; ++k) whole[k] = load(row + k * kWidth);
  const auto distance_of = [&](int64_t code) __attribute__((always_inline)) {
    const T* at = book + code * codes.stride;
    if constexpr (vectors > 0) return squared_differences<vectors>(whole, at);
    return squared_differences(row, at, codes.width);
  };
  Vec least = broadcast(__builtin_inff()), sum = zeros();
  const auto step = [&](int64_t code) __attribute__((always_inline)) {
    Vec sums[kWidth];
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) sums[i] = distance_of(code + i);
    const Vec found = sums_of(sums);
    store(distances + code, found);
    least = min(found, least);
    sum += found;  // a minimum alone loses NaN
  };
  // Memory gives two streams in less time than one.
  const int64_t half = (end - begin) / (2 * kWidth) * kWidth;
  int64_t code = begin;
  for (; code < begin + half; code += kWidth) {
    step(code);
    step(code + half);
  }
  code += half;
  float best = -reduce_max(zeros() - least), total = reduce_add(sum);
  for (; code < end; ++code) {
    const float distance = reduce_add(distance_of(code));
    distances[code] = distance;
    if (distance < best) best = distance;
    total += distance;
  }
  return total < __builtin_inff() ? best : __builtin_nanf("");
}

template <typename T>
float distances_from(const float* row, const Matrix& codes, int64_t begin, int64_t end, float* distances) {
  const T* book = static_cast<const T*>(codes.data);
  if (codes.width == 64) return distances_from<held(64)>(row, book, codes, begin, end, distances);
  if (codes.width == 128) return distances_from<held(128)>(row, book, codes, begin, end, distances);
  return distances_from<0>(row, book, codes, begin, end, distances);
}

template <typename T>
void take_off(float* row, const T* code, int64_t width) {
  for (int64_t k = 0; k < width; k += kWidth) {
    const int rest = static_cast<int>(smaller(kWidth, width - k));
    store_first(row + k, load_first(row + k, rest) - load_first(code + k, rest), rest);
  }
}

}  // namespace

float row_distances(const float* row, const Matrix& codes, int64_t begin, int64_t end, float* distances) {
  switch (codes.element) {
    case Element::float16:
      return distances_from<Half>(row, codes, begin, end, distances);
    case Element::bfloat16:
      return distances_from<BFloat16>(row, codes, begin, end, distances);
    default:
      return distances_from<float>(row, codes, begin, end, distances);
  }
}

NearestCode rerank_row(float* row, const Matrix& codes, const float* distances, float threshold) {
  NearestCode nearest{-1, 0};
  Score least{};
  const double row_square = squared_norm(row, codes.width);
  const Vec bound = broadcast(threshold);
  for (int64_t first = 0; first < codes.rows; first += kWidth) {
    const int rest = static_cast<int>(smaller(kWidth, codes.rows - first));
    uint32_t near = bits(bound >= load_first(distances + first, rest));
    if (rest < kWidth) near &= (1u << rest) - 1;
    for (; near != 0; near &= near - 1) {
      const int64_t code = first + __builtin_ctz(near);
      const Score score = exact_score(row, codes, code, Metric::l2, row_square);
      if (nearest.code >= 0 && !score.before(least)) continue;
      least = score;
      nearest = {static_cast<int32_t>(code), score.value};
    }
  }
  const int64_t offset = nearest.code * codes.stride;
  switch (codes.element) {
    case Element::float16:
      take_off(row, static_cast<const Half*>(codes.data) + offset, codes.width);
      break;
    case Element::bfloat16:
      take_off(row, static_cast<const BFloat16*>(codes.data) + offset, codes.width);
      break;
    default:
      take_off(row, static_cast<const float*>(codes.data) + offset, codes.width);
  }
  return nearest;
}

double row_square(const float* row, int64_t width) { return squared_norm(row, width); }

}  // namespace ZTOK_ISA
}  // namespace ztok
