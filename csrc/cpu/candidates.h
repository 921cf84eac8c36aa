// Nearest-code search in float32 with a rigorous bound on its error, and the choice among what the bound leaves open.
//
// Squared distances do not change when rows and codes are taken less one vector, the centre; their products and the
// bound on the products' error do, so l2 is searched around a vector amid the codes. A float32 difference is off by a
// rounding at most, relative to itself: it counts as one more rounding of each factor.
//
// A score is what the nearest code maximises: x.c - |c|^2 / 2 for l2, x.c for dot, x.c / |c| for cosine. Each float32
// score of a code block is within `error_bound` of the true one. With `lower` the largest score seen less its error
// bound, a code can be the best only if its score is at least the threshold, lower - error_bound. That is rare: per
// register tile the search costs six maxima, six comparisons and one branch. What passes is kept and reranked in
// float64. The least of what was kept is exactly the float64 answer, whatever the order, the blocks, the threads and
// the instruction set.
//
// Included by kernel files only (see isa.h).
#pragma once

#include "bounds.h"
#include "exact_score.h"
#include "nearest_kernel.h"
#include "score_tile.h"

namespace ztok {
namespace ZTOK_ISA {

constexpr float kLeast = 0x1p-126f;   // what one operation may lose to underflow, flushed to zero or not
constexpr float kLargest = 0x1p120f;  // scores below this cannot overflow on the way
constexpr float kNotANumber = __builtin_nanf("");

// Drops candidates that cannot be the best any more. Where many are left they are decided in float64, so that a row
// with thousands of equal codes needs no more memory than another.
__attribute__((noinline)) inline void prune(Search& search, int64_t slot, const Matrix& codes, Metric metric) {
  Candidate* candidates = search.candidates + slot * kCandidates;
  int kept = 0;
  for (int i = 0; i < search.candidate_counts[slot]; ++i) {
    if (candidates[i].upper >= search.lower[slot]) candidates[kept++] = candidates[i];
  }
  if (kept > kCandidates / 2) {
    const float* row = search.rows + search.index[slot] * codes.width;
    const double row_square = squared_norm(row, codes.width);
    Score least{};
    int best = -1;
    for (int i = 0; i < kept; ++i) {
      const Score score = exact_score(row, codes, candidates[i].code, metric, row_square);
      if (best < 0 || score.before(least)) least = score, best = i;
    }
    candidates[0] = candidates[best];
    kept = 1;
  }
  search.candidate_counts[slot] = kept;
}

// Raises the bound of a row to `best`, its largest score seen.
inline void raise(Search& search, int64_t slot, float best) {
  const float error_bound = search.error_bound[slot], lower = best - error_bound;
  if (lower > search.lower[slot]) search.lower[slot] = lower;
  search.threshold[slot] = search.lower[slot] - error_bound;
}

// Keeps the codes of a panel whose scores are at least the row's threshold.
inline void keep_panel(Search& search, int64_t slot, int64_t code, const float* scores, const Matrix& codes,
                       Metric metric) {
  const Vec threshold = broadcast(search.threshold[slot]);
  const Mask left = load(scores) >= threshold, right = load(scores + kWidth) >= threshold;
  uint64_t passed = bits(left) | static_cast<uint64_t>(bits(right)) << kWidth;
  for (; passed != 0; passed &= passed - 1) {
    const int lane = __builtin_ctzll(passed);
    if (search.candidate_counts[slot] == kCandidates) prune(search, slot, codes, metric);
    const int32_t n = search.candidate_counts[slot]++;
    search.candidates[slot * kCandidates + n] = {static_cast<int32_t>(code + lane),
                                                 scores[lane] + search.error_bound[slot]};
  }
}

// Some score of a tile is at least its row's threshold. Rows are found without branches, which would be mispredicted.
__attribute__((noinline)) inline void keep_tile(Search& search, int64_t slot, int64_t code, const float* tile,
                                                const Matrix& codes, Metric metric) {
  uint32_t rows = 0;
  for (int r = 0; r < kTileRows; ++r) {
    const Vec largest = max(load(tile + r * kPanel), load(tile + r * kPanel + kWidth));
    rows |= static_cast<uint32_t>(any(largest >= broadcast(search.threshold[slot + r]))) << r;
  }
  for (; rows != 0; rows &= rows - 1) {
    const int r = __builtin_ctz(rows);
    const float* scores = tile + r * kPanel;
    raise(search, slot + r, reduce_max(max(load(scores), load(scores + kWidth))));
    keep_panel(search, slot + r, code, scores, codes, metric);
  }
}

// The same for the scores [kTileRows, kBlockCodes] of a whole block.
__attribute__((noinline)) inline void keep_block(Search& search, int64_t slot, int64_t code, const float* scores,
                                                 int64_t panels, const Matrix& codes, Metric metric) {
  for (int r = 0; r < kTileRows; ++r, ++slot, scores += kBlockCodes) {
    Vec largest = max(load(scores), load(scores + kWidth));
    for (int64_t i = kPanel; i < panels * kPanel; i += kWidth) largest = max(load(scores + i), largest);
    if (!any(largest >= broadcast(search.threshold[slot]))) continue;
    raise(search, slot, reduce_max(largest));
    const Vec threshold = broadcast(search.threshold[slot]);
    uint32_t passing = 0;
    for (int64_t p = 0; p < panels; ++p) {
      const Vec both = max(load(scores + p * kPanel), load(scores + p * kPanel + kWidth));
      passing |= static_cast<uint32_t>(any(both >= threshold)) << p;
    }
    for (; passing != 0; passing &= passing - 1) {
      const int p = __builtin_ctz(passing);
      keep_panel(search, slot, code + p * kPanel, scores + p * kPanel, codes, metric);
    }
  }
}

inline void search_exactly(Search& search, int64_t slot) {
  search.candidate_counts[slot] = kExact;
  search.norm[slot] = 0;
  search.lower[slot] = search.threshold[slot] = kNotANumber;
}

// The bounds of all rows for the codes of one block.
inline void begin_block(Search& search, const CodeBlock& block, int64_t width, Metric metric) {
  search.suspect |= !(block.longest < __builtin_inff());
  // A score is a sum of `width` products and the bias, each of which takes part in at most width + 1 roundings; the
  // bias is itself a sum of that many squares. The factors may be differences, rounded once each. 32 more and a per
  // cent cover what is done with bounds here, in float32.
  const Vec rounding = broadcast(1.01f * kUnit * static_cast<float>(2 * width + 36));
  const Vec underflow = broadcast(kLeast * static_cast<float>(2 * width + 32)), one = broadcast(1.0f);
  const Vec longest = broadcast(block.longest);
  const Vec bias = broadcast(metric == Metric::l2 ? block.longest * block.longest / 2 : 0.0f);
  for (int64_t i = 0; i < search_slots(search.count); i += kWidth) {
    const Vec norm = load(search.norm + i);
    const Vec size = fma(norm, longest, bias);
    const Vec error_bound = fma(rounding, size, underflow * (one + norm + longest));
    store(search.error_bound + i, error_bound);
    store(search.threshold + i, load(search.lower + i) - error_bound);
    // Written so that a NaN, of an infinite length times 0, is too large as well.
    uint32_t too_large = ~bits(broadcast(kLargest) > size) & ((1u << kWidth) - 1);
    for (; too_large != 0; too_large &= too_large - 1) {
      const int64_t slot = i + __builtin_ctz(too_large);
      if (slot < search.count && search.candidate_counts[slot] >= 0) search_exactly(search, slot);
    }
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
