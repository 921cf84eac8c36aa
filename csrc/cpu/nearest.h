// Nearest-code search with residual levels, for the ops that need it.
#pragma once

#include <cstdint>

#include "score_layout.h"

namespace ztok {

// Codebooks [levels, size, width].
struct Codebooks {
  Matrix first;  // the first level: `size` rows
  int64_t levels;
  int64_t level_stride;  // elements

  Matrix level(int64_t l) const;
};

// Residual levels used per row, int32 or int64; null data: all of them.
struct LevelCounts {
  const void* data = nullptr;
  bool is_int64 = false;

  int64_t of(int64_t row, int64_t all) const {
    if (data == nullptr) return all;
    return is_int64 ? static_cast<const int64_t*>(data)[row] : static_cast<const int32_t*>(data)[row];
  }
};

struct SearchResult {
  int32_t* codes;              // [rows, levels], -1 where a level is not used
  float* distances = nullptr;  // [rows, levels] or null: not written where a level is not used
  double* errors = nullptr;    // [rows] or null: sum over the used levels of the squared length of what is left
};

// The nearest code of each row at each level it uses, by the contract of ztok_fast.ops.codebook_assign: the float64
// answer, the lowest code among equals; code 0 and distance and error NaN for a row that is not finite. The result does
// not depend on the other rows, the number of threads or the instruction set.
//
// Returns false, and the results mean nothing, if a code is not finite. That costs no pass of its own over the codes:
// the squares of their lengths, which are summed anyway, tell which codebooks to look at.
//
// Extra memory: O(levels * size * width) for many rows, O(width) per thread for few, besides O(1) per row.
[[nodiscard]] bool search_codes(const Matrix& rows, const Codebooks& codebooks, Metric metric,
                                const LevelCounts& levels, const SearchResult& result);

}  // namespace ztok
