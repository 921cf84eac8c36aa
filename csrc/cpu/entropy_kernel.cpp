// Counts are integers, so their sums are exact whatever the order: only exp must have the same bits everywhere.
#include "entropy_kernel.h"

#include "lanes.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

constexpr int64_t kBlock = 128;

// 1 + rint(x), 0 <= x <= 2^30 and a little
inline void store_counts(uint32_t* counts, Lanes x) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(counts, _mm512_add_epi32(_mm512_cvtps_epi32(x.v), _mm512_set1_epi32(1)));
#elif defined(__AVX2__)
  const __m256i one = _mm256_set1_epi32(1);
  auto* out = reinterpret_cast<__m256i*>(counts);
  _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_cvtps_epi32(x.a), one));
  _mm256_storeu_si256(out + 1, _mm256_add_epi32(_mm256_cvtps_epi32(x.b), one));
#else
  float values[kLaneCount];
  store16(values, x);
  for (int i = 0; i < kLaneCount; ++i) {
    // Adding 2^23 rounds to an integer; what is not below 2^23 is one.
    const float rounded = values[i] < 0x1p23f ? (values[i] + 0x1p23f) - 0x1p23f : values[i];
    counts[i] = static_cast<uint32_t>(rounded) + 1;
  }
#endif
}

inline Lanes weights(Lanes logits, Lanes largest) { return exp16(logits - largest) * splat(0x1p30f); }

// counts[0 .. n), n <= kBlock
inline void block_counts(const float* logits, int64_t n, float largest, uint32_t* counts) {
  const Lanes top = splat(largest);
  int64_t i = 0;
  for (; i + kLaneCount <= n; i += kLaneCount) store_counts(counts + i, weights(load16(logits + i), top));
  if (i == n) return;
  float rest[kLaneCount];
  uint32_t last[kLaneCount];
  store16(rest, top);
  for (int64_t j = i; j < n; ++j) rest[j - i] = logits[j];
  store_counts(last, weights(load16(rest), top));
  for (int64_t j = i; j < n; ++j) counts[j] = last[j - i];
}

inline uint64_t sum_of_counts(const float* logits, int64_t count, float largest) {
  uint64_t sum = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    uint32_t counts[kBlock];
    const int64_t n = count - first < kBlock ? count - first : kBlock;
    block_counts(logits + first, n, largest, counts);
    for (int64_t i = 0; i < n; ++i) sum += counts[i];
  }
  return sum;
}

inline bool find_largest(const float* logits, int64_t count, float* result) {
  float largest = logits[0], checked = 0;
  int64_t i = 0;
  if (count >= kLaneCount) {
    Lanes top = load16(logits), sums = splat(0);
    for (; i + kLaneCount <= count; i += kLaneCount) {
      const Lanes x = load16(logits + i);
      top = larger(top, x);
      sums = sums + x * splat(0);  // NaN for what is not finite
    }
    largest = tree_max(top);
    checked = tree_sum(sums);
  }
  for (; i < count; ++i) {
    largest = logits[i] > largest ? logits[i] : largest;
    checked += logits[i] * 0;
  }
  *result = largest;
  return checked == 0;
}

}  // namespace

bool token_interval(const float* logits, int64_t count, int64_t token, Interval* interval) {
  float largest;
  if (!find_largest(logits, count, &largest)) return false;
  interval->start = sum_of_counts(logits, token, largest);
  interval->size = sum_of_counts(logits + token, 1, largest);
  interval->total = interval->start + interval->size + sum_of_counts(logits + token + 1, count - token - 1, largest);
  return true;
}

bool count_row(const float* logits, int64_t count, RowCounts* row) {
  if (!find_largest(logits, count, &row->largest)) return false;
  row->length = ((count + kStretches - 1) / kStretches + kBlock - 1) / kBlock * kBlock;
  row->total = 0;
  for (int64_t s = 0; s * row->length < count; ++s) {
    const int64_t left = count - s * row->length;
    row->sums[s] = sum_of_counts(logits + s * row->length, left < row->length ? left : row->length, row->largest);
    row->total += row->sums[s];
  }
  return true;
}

int64_t find_token(const float* logits, int64_t count, const RowCounts& row, uint64_t value, Interval* interval) {
  uint64_t start = 0;
  int64_t token = 0;
  for (int64_t s = 0; value - start >= row.sums[s]; ++s, token += row.length) start += row.sums[s];
  for (;; token += kBlock) {
    uint32_t counts[kBlock];
    const int64_t n = count - token < kBlock ? count - token : kBlock;
    block_counts(logits + token, n, row.largest, counts);
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += counts[i];
    if (value - start >= sum) {
      start += sum;
      continue;
    }
    int64_t i = 0;
    for (; value - start >= counts[i]; ++i) start += counts[i];
    *interval = {start, counts[i], row.total};
    return token + i;
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
