// The inner parts of nearest-code search, one version per instruction set; nearest.cpp drives them.
#pragma once

#include "isa.h"
#include "score_layout.h"

namespace ztok {

constexpr int kCandidates = 16;
constexpr int32_t kExact = -1;      // a candidate count: too large for float32, compare with all codes in float64
constexpr int32_t kNotFinite = -2;  // a candidate count: the row has no nearest code

struct Candidate {
  int32_t code;
  float upper;  // its true score is not above this
};

// Rows that are being searched (those of a block that use the level) and what is known of each. The arrays are as long
// as the number of rows rounded up to whole register tiles and vectors (`search_slots`).
struct Search {
  const float* rows;     // [*, width], what the levels before left over
  const int32_t* index;  // [count]: which of them
  const float* tiles;    // the same, packed
  int64_t count;
  float* norm;    // length, 0 where the row is not searched in float32
  float* lower;   // the best true score is at least this; NaN where the row is not searched in float32
  float* slack;   // how far a float32 score of the current code block may be off
  float* reach;   // lower - slack: a float32 score below it cannot be the best; NaN lets nothing pass
  int32_t* candidate_counts;
  Candidate* candidates;  // [count, kCandidates], by ascending code
};

struct Settled {
  int32_t* codes;       // by row number, `stride` from row to row
  float* distances;     // likewise, or null
  int64_t stride;
  double* errors;       // by row number, or null: the squared length of what is left is added
};

constexpr int64_t kSlotUnit = 48;  // a multiple of kTileRows and of every vector width
static inline int64_t search_slots(int64_t rows) { return round_up(rows, kSlotUnit); }

// Packs codes [block.first, block.first + block.count). `staging` holds kBlockCodes rows of floats, for cosine alone.
ZTOK_KERNEL(void, pack_codes, const Matrix& codes, Metric metric, float* staging, CodeBlock& block)

// float32 rows [count, width] from whatever they are.
ZTOK_KERNEL(void, to_floats, const Matrix& matrix, int64_t first, int64_t count, float* rows)

// Rows rows[index[i]] in tiles; see score_tile.h.
ZTOK_KERNEL(void, pack_tiles, const float* rows, const int32_t* index, int64_t count, int64_t width, float* tiles)

// Before the first block.
ZTOK_KERNEL(void, begin_search, Search& search, int64_t width)

// Compares with the codes of one block. `scratch` holds kBlockCodes * search_slots(count) floats, for widths that are
// searched in parts.
ZTOK_KERNEL(void, search_block, Search& search, const CodeBlock& block, const Matrix& codes, Metric metric,
            float* scratch)

// After the last block: the winner of rows [begin, end) among the candidates of `parts` searches of the same rows over
// different codes, in ascending order; what the winner leaves over replaces the row.
ZTOK_KERNEL(void, settle, const Search* searches, int64_t parts, int64_t begin, int64_t end, const Matrix& codes,
            Metric metric, float* rows, const Settled& settled)

}  // namespace ztok
