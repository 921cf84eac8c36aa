#include "engine_attention_kernel.h"

#include "lanes.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

// Registers of partial results: enough chains to hide the latency of fma.
#if defined(__AVX512F__)
constexpr int kKeyBlocks = 8, kValueSlices = 4, kMostQueries = 2;
#else
constexpr int kKeyBlocks = 4, kValueSlices = 1, kMostQueries = 1;
#endif
constexpr int kChains = 4;

// Queries over one cache, one after another in memory, with a row of scores and of the result each.
struct Queries {
  const float* values;
  int64_t width;
  float* scores;
  int64_t scores_stride;
  float* out;
};

// sums[q][b] = scores of keys 16 b ... 16 b + 15 from `keys` on. Several queries share the loads.
template <int kQueries, int kBlocks, typename T>
ZTOK_LANES void key_scores(const Queries& queries, const T* keys, Lanes (*sums)[kBlocks]) {
  const int64_t width = queries.width;
#pragma GCC unroll 2
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) sums[q][b] = splat(0.0f);
  }
  for (int64_t i = 0; i < width; ++i) {
    Lanes query[kQueries];
#pragma GCC unroll 2
    for (int q = 0; q < kQueries; ++q) query[q] = splat(queries.values[q * width + i]);
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const Lanes key = load16(keys + (b * width + i) * kLaneCount);
#pragma GCC unroll 2
      for (int q = 0; q < kQueries; ++q) sums[q][b] = fma(query[q], key, sums[q][b]);
    }
  }
}

template <int kQueries, int kBlocks, typename T>
ZTOK_LANES void store_scores(const Queries& queries, const T* keys, Lanes scale, Lanes* largest, int64_t first) {
  Lanes sums[kQueries][kBlocks];
  key_scores<kQueries, kBlocks>(queries, keys + first * queries.width * kLaneCount, sums);
#pragma GCC unroll 2
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
      const Lanes scaled = sums[q][b] * scale;
      largest[q] = larger(largest[q], scaled);
      store16(queries.scores + q * queries.scores_stride + (first + b) * kLaneCount, scaled);
    }
  }
}

// Columns [column, column + 16 kSlices) of the result.
template <int kQueries, int kSlices, typename T>
ZTOK_LANES void weigh_values(const Queries& queries, const T* values, int64_t column, int64_t count,
                             const Lanes* totals) {
  const int64_t width = queries.width;
  const T* from = values + column;
  Lanes sums[kQueries][kChains][kSlices];
#pragma GCC unroll 2
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 4
      for (int s = 0; s < kSlices; ++s) sums[q][c][s] = splat(0.0f);
    }
  }
  const auto add = [&](int64_t j, int c) __attribute__((always_inline)) {
    Lanes p[kQueries];
#pragma GCC unroll 2
    for (int q = 0; q < kQueries; ++q) p[q] = splat(queries.scores[q * queries.scores_stride + j + c]);
#pragma GCC unroll 4
    for (int s = 0; s < kSlices; ++s) {
      const Lanes value = load16(from + (j + c) * width + s * kLaneCount);
#pragma GCC unroll 2
      for (int q = 0; q < kQueries; ++q) sums[q][c][s] = fma(p[q], value, sums[q][c][s]);
    }
  };
  int64_t j = 0;
  for (; j + kChains <= count; j += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) add(j, c);
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChains - 1; ++c) {
    if (j + c >= count) break;
    add(j, c);
  }
#pragma GCC unroll 2
  for (int q = 0; q < kQueries; ++q) {
#pragma GCC unroll 4
    for (int s = 0; s < kSlices; ++s) {
      const Lanes sum = (sums[q][0][s] + sums[q][2][s]) + (sums[q][1][s] + sums[q][3][s]);
      store16(queries.out + q * width + column + s * kLaneCount, sum / totals[q]);
    }
  }
}

template <int kQueries, typename T>
void attend(const Queries& queries, const T* keys, const T* values, int64_t count, float scale) {
  const int64_t whole = count / kLaneCount, blocks = (count + kLaneCount - 1) / kLaneCount, width = queries.width;
  const Lanes scales = splat(scale);
  Lanes most[kQueries], totals[kQueries];
  for (int q = 0; q < kQueries; ++q) most[q] = splat(-__builtin_inff());
  int64_t b = 0;
  for (; b + kKeyBlocks <= whole; b += kKeyBlocks) store_scores<kQueries, kKeyBlocks>(queries, keys, scales, most, b);
  for (; b + 2 <= whole; b += 2) store_scores<kQueries, 2>(queries, keys, scales, most, b);
  for (; b < whole; ++b) store_scores<kQueries, 1>(queries, keys, scales, most, b);
  Lanes last[kQueries][1];
  if (whole < blocks) key_scores<kQueries, 1>(queries, keys + whole * width * kLaneCount, last);
  for (int q = 0; q < kQueries; ++q) {
    float* scores = queries.scores + q * queries.scores_stride;
    float largest = tree_max(most[q]);
    if (whole < blocks) {  // keys past `count` may hold anything
      float* own = scores + whole * kLaneCount;
      store16(own, last[q][0] * scales);
      for (int64_t i = 0; i < count - whole * kLaneCount; ++i) largest = largest > own[i] ? largest : own[i];
    }
    Lanes sums = splat(0.0f);
    for (int64_t k = 0; k < blocks; ++k) {
      const Lanes p = first_lanes(exp16(load16(scores + k * kLaneCount) - splat(largest)), count - k * kLaneCount);
      sums = sums + p;
      store16(scores + k * kLaneCount, p);
    }
    totals[q] = splat(tree_sum(sums));
  }
  constexpr int kSlices = kQueries > 1 ? kValueSlices / 2 : kValueSlices;
  int64_t i = 0;
  for (; i + kSlices * kLaneCount <= width; i += kSlices * kLaneCount) {
    weigh_values<kQueries, kSlices>(queries, values, i, count, totals);
  }
  if (kSlices > 2 && i + 2 * kLaneCount <= width) {
    weigh_values<kQueries, 2>(queries, values, i, count, totals);
    i += 2 * kLaneCount;
  }
  for (; i < width; i += kLaneCount) weigh_values<kQueries, 1>(queries, values, i, count, totals);
}

template <typename T>
void attend_all(Queries queries, int64_t left, const HeadCache& cache, int64_t count, float scale) {
  const auto *keys = static_cast<const T*>(cache.keys), *values = static_cast<const T*>(cache.values);
  while (left > 0) {
    const int64_t some = left < kMostQueries ? 1 : kMostQueries;
    if (some == kMostQueries) {
      attend<kMostQueries>(queries, keys, values, count, scale);
    } else {
      attend<1>(queries, keys, values, count, scale);
    }
    queries.values += some * queries.width;
    queries.out += some * queries.width;
    left -= some;
  }
}

}  // namespace

void engine_cache(const float* key, const float* value, const HeadCache& cache, int64_t row) {
  const int64_t column = row / kLaneCount * kLaneCount * cache.width + row % kLaneCount, first = row * cache.width;
  for (int64_t i = 0; i < cache.width; i += kLaneCount) {
    if (!cache.is_half) {
      for (int64_t k = i; k < i + kLaneCount; ++k) static_cast<float*>(cache.keys)[column + k * kLaneCount] = key[k];
      store16(static_cast<float*>(cache.values) + first + i, load16(value + i));
      continue;
    }
    const Lanes most = splat(65504.0f), least = splat(-65504.0f);
    Half rounded[kLaneCount];
    // In this order of the arguments, what is NaN stays NaN.
    store16(rounded, smaller_of(most, larger(least, load16(key + i))));
    for (int64_t k = 0; k < kLaneCount; ++k) {
      static_cast<Half*>(cache.keys)[column + (i + k) * kLaneCount] = rounded[k];
    }
    store16(static_cast<Half*>(cache.values) + first + i, smaller_of(most, larger(least, load16(value + i))));
  }
}

void engine_attend(const float* queries, int64_t num_queries, const HeadCache& cache, int64_t count, float scale,
                   float* scores, int64_t scores_stride, float* out) {
  const Queries own{queries, cache.width, scores, scores_stride, out};
  if (cache.is_half) {
    attend_all<Half>(own, num_queries, cache, count, scale);
  } else {
    attend_all<float>(own, num_queries, cache, count, scale);
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
