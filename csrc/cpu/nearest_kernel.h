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
  const float* rows = nullptr;     // [*, width], what the levels before left over
  const int32_t* index = nullptr;  // [count]: which of them
  const float* tiles = nullptr;    // the same less the centre, packed; not packed for `search_unpacked`
  const float* centre = nullptr;   // [width] or null: what is taken off rows and codes before they are multiplied
  int64_t count = 0;
  float* norm = nullptr;         // length, 0 where the row is not searched in float32
  float* lower = nullptr;        // the best true score is at least this; NaN where the row is not searched in float32
  float* error_bound = nullptr;  // how far a float32 score of the current code block may be off
  float* threshold =
      nullptr;  // lower - error_bound: a float32 score below it cannot be the best; NaN lets nothing pass
  int32_t* candidate_counts = nullptr;
  Candidate* candidates = nullptr;  // [count, kCandidates], by ascending code
  bool begun = false;               // has seen a block
  bool suspect = false;             // has seen a code whose square is no float32, be it very long or not finite
};

struct Reranked {
  int32_t* codes;    // by row number, `stride` from row to row
  float* distances;  // likewise, or null
  int64_t stride;
  double* errors;  // by row number, or null: the squared length of what is left is added
  bool last;       // what is left of the rows is of no interest
};

constexpr int64_t kSlotUnit = 48;  // a multiple of kTileRows and of every vector width
static inline int64_t search_slots(int64_t rows) { return round_up(rows, kSlotUnit); }

// Before the first block.
ZTOK_KERNEL(void, begin_search, Search& search, int64_t width)

// Compares with the codes of one block. `scratch` holds kBlockCodes * search_slots(count) floats, for widths that are
// searched in parts.
ZTOK_KERNEL(void, search_block, Search& search, const CodeBlock& block, const Matrix& codes, Metric metric,
            float* scratch)

// The same without packing, for rows that are rows 0 to count - 1, and for l2 and dot. Of the block, `first` and
// `count` are given. With a centre, `search.tiles` holds the rows less the centre, one after another.
ZTOK_KERNEL(void, search_unpacked, Search& search, CodeBlock& block, const Matrix& codes, Metric metric, float* scratch)

// After the last block: the winner of rows [begin, end) among the candidates of `parts` searches of the same rows over
// different codes; what the winner leaves over replaces the row.
ZTOK_KERNEL(void, rerank, const Search* searches, int64_t parts, int64_t begin, int64_t end, const Matrix& codes,
            Metric metric, float* rows, const Reranked& reranked)

}  // namespace ztok
