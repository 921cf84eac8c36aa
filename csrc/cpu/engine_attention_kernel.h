// The engine's cache of keys and values and attention over it, once per instruction set (see isa.h), with the
// arithmetic of docs/determinism.md. Widths are multiples of 16.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ztok {

// Keys and values of one head of one sequence: keys [blocks of 16, width, 16], values [rows, width]; float16 where
// `is_half`, else float32.
struct HeadCache {
  void* keys;
  void* values;
  int64_t width;
  bool is_half;
};

ZTOK_KERNEL(void, engine_cache, const float* key, const float* value, const HeadCache& cache, int64_t row)

constexpr int64_t kScoreRows = 2;  // that engine_attend needs

// Queries [num_queries, width] over the first `count` rows of the cache; `scores` has kScoreRows rows of at least count
// rounded up to 16.
ZTOK_KERNEL(void, engine_attend, const float* queries, int64_t num_queries, const HeadCache& cache, int64_t count,
            float scale, float* scores, int64_t scores_stride, float* out)

}  // namespace ztok
