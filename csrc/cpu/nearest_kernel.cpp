// Nearest-code search in float32 with a rigorous bound on its error, and the choice among what the bound leaves open.
//
// A score is what the nearest code maximises: x.c - |c|^2 / 2 for l2, x.c for dot, x.c / |c| for cosine. Each float32
// score of a code block is within `slack` of the true one, so a code can be the best only if its score reaches
// lower - slack, with `lower` the largest score seen less its slack. That is rare: per register tile the search costs six
// maxima, six comparisons and one branch. What passes is kept, and the winner is the least in float64 of what was kept:
// exactly the float64 answer, whatever the order, the blocks, the threads and the instruction set.
#include "nearest_kernel.h"

#include <cfloat>

#include "exact_score.h"
#include "score_tile.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

constexpr float kUnit = 0x1p-24f;       // float32's unit roundoff
constexpr float kLeast = 0x1p-126f;     // what one operation may lose to underflow, flushed to zero or not
constexpr float kLargest = 0x1p120f;    // scores below this cannot overflow on the way

float not_a_number() { return __builtin_nanf(""); }

// Drops candidates that cannot be the best any more. Where many are left they are settled in float64, so that a row with
// thousands of equal codes needs no more memory than another.
__attribute__((noinline)) void prune(Search& search, int64_t slot, const Matrix& codes, Metric metric) {
  Candidate* candidates = search.candidates + slot * kCandidates;
  int kept = 0;
  for (int i = 0; i < search.candidate_counts[slot]; ++i) {
    if (candidates[i].upper >= search.lower[slot]) candidates[kept++] = candidates[i];
  }
  if (kept > kCandidates / 2) {
    const float* row = search.rows + search.index[slot] * codes.width;
    double least = 0;
    int best = -1;
    for (int i = 0; i < kept; ++i) {
      const double score = exact_score(row, codes, candidates[i].code, metric);
      if (best < 0 || score < least) least = score, best = i;
    }
    candidates[0] = candidates[best];
    kept = 1;
  }
  search.candidate_counts[slot] = kept;
}

// Some score of a tile reaches its row's bound: scores [kTileRows, kPanel] of rows from `slot`, codes from `code` on.
__attribute__((noinline)) void keep(Search& search, int64_t slot, int64_t code, const float* scores,
                                    const Matrix& codes, Metric metric) {
  for (int r = 0; r < kTileRows; ++r, ++slot, scores += kPanel) {
    const Vec left = load(scores), right = load(scores + kWidth), largest = max(left, right);
    if (!any(largest >= broadcast(search.reach[slot]))) continue;
    const float slack = search.slack[slot], lower = reduce_max(largest) - slack;
    if (lower > search.lower[slot]) {
      search.lower[slot] = lower;
      search.reach[slot] = lower - slack;
    }
    const Vec reach = broadcast(search.reach[slot]);
    uint64_t passed = bits(left >= reach) | static_cast<uint64_t>(bits(right >= reach)) << kWidth;
    for (; passed != 0; passed &= passed - 1) {
      const int lane = __builtin_ctzll(passed);
      if (search.candidate_counts[slot] == kCandidates) prune(search, slot, codes, metric);
      const int32_t n = search.candidate_counts[slot]++;
      search.candidates[slot * kCandidates + n] = {static_cast<int32_t>(code + lane), scores[lane] + slack};
    }
  }
}

void search_exactly(Search& search, int64_t slot) {
  search.candidate_counts[slot] = kExact;
  search.norm[slot] = 0;
  search.lower[slot] = search.reach[slot] = not_a_number();
}

// The bounds of all rows for the codes of one block.
void begin_block(Search& search, const CodeBlock& block, int64_t width, Metric metric) {
  // A score is a sum of `width` products and the bias, each of which takes part in at most width + 1 roundings; the bias
  // is itself a sum of that many squares. 32 more and a per cent cover what is done with bounds here, in float32.
  const Vec rounding = broadcast(1.01f * kUnit * static_cast<float>(2 * width + 32));
  const Vec underflow = broadcast(kLeast * static_cast<float>(2 * width + 32)), one = broadcast(1.0f);
  const Vec longest = broadcast(block.longest);
  const Vec bias = broadcast(metric == Metric::l2 ? block.longest * block.longest / 2 : 0.0f);
  for (int64_t i = 0; i < search_slots(search.count); i += kWidth) {
    const Vec norm = load(search.norm + i);
    const Vec size = fma(norm, longest, bias);
    const Vec slack = fma(rounding, size, underflow * (one + norm + longest));
    store(search.slack + i, slack);
    store(search.reach + i, load(search.lower + i) - slack);
    // Written so that a NaN, of an infinite length times 0, is too large as well.
    uint32_t too_large = ~bits(broadcast(kLargest) > size) & ((1u << kWidth) - 1);
    for (; too_large != 0; too_large &= too_large - 1) {
      const int64_t slot = i + __builtin_ctz(too_large);
      if (slot < search.count && search.candidate_counts[slot] >= 0) search_exactly(search, slot);
    }
  }
}

template <bool kFirst, bool kLast>
void sweep(Search& search, const CodeBlock& block, const Matrix& codes, Metric metric, int64_t part, float* scratch) {
  const int64_t num_tiles = (search.count + kTileRows - 1) / kTileRows, num_panels = panels_of(block.count);
  const int64_t depth = smaller(part_depth(codes.width), codes.width - part);
  const float* panel = block.panels + part * num_panels * kPanel;
  const float* tiles = search.tiles + part * num_tiles * kTileRows;
  for (int64_t p = 0; p < num_panels; ++p, panel += depth * kPanel) {
    for (int64_t t = 0; t < num_tiles; ++t, scratch += kTileRows * kPanel) {
      Tile tile;
      if (kFirst) {
        start(block.bias + p * kPanel, tile);
      } else {
        load_tile(scratch, tile);
      }
      accumulate(tiles + t * depth * kTileRows, panel, depth, tile);
      if (!kLast) {
        store_tile(scratch, tile);
        continue;
      }
      const float* reach = search.reach + t * kTileRows;
      Mask reached = max(tile[0][0], tile[0][1]) >= broadcast(reach[0]);
#pragma GCC unroll 6
      for (int r = 1; r < kTileRows; ++r) reached = reached | (max(tile[r][0], tile[r][1]) >= broadcast(reach[r]));
      if (__builtin_expect(any(reached), false)) {
        alignas(64) float scores[kTileRows * kPanel];
        store_tile(scores, tile);
        keep(search, t * kTileRows, block.first + p * kPanel, scores, codes, metric);
      }
    }
  }
}

// Unit codes in float32; a code of zeros stays zero. The length is taken in float64, where no square of a float32 over-
// or underflows.
template <typename T>
void unit_codes(const T* codes, int64_t stride, int64_t count, int64_t width, float* units) {
  float buffer[kChunk];
  for (int64_t i = 0; i < count; ++i, codes += stride, units += width) {
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t depth = smaller(kChunk, width - first);
      const float* c = floats_of(codes + first, depth, buffer);
      for (int64_t k = 0; k < depth; ++k) units[first + k] = c[k];
    }
    const double square = squared_norm(units, width);
    const double inverse = square > 0 ? 1 / __builtin_sqrt(square) : 0;
    for (int64_t k = 0; k < width; ++k) units[k] = static_cast<float>(units[k] * inverse);
  }
}

template <typename T>
void pack_typed(const T* codes, const Matrix& matrix, Metric metric, float* staging, CodeBlock& block) {
  alignas(64) float squares[kBlockCodes];
  codes += block.first * matrix.stride;
  if (metric == Metric::cosine) {
    unit_codes(codes, matrix.stride, block.count, matrix.width, staging);
    pack_panels(staging, matrix.width, block.count, matrix.width, block.panels, squares);
  } else {
    pack_panels(codes, matrix.stride, block.count, matrix.width, block.panels, squares);
  }
  float largest = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    if (!(squares[i] <= largest)) largest = squares[i];  // NaN stays, and stands for too large
    block.bias[i] = metric == Metric::l2 ? -squares[i] / 2 : 0.0f;
  }
  for (int64_t i = block.count; i < panels_of(block.count) * kPanel; ++i) block.bias[i] = -FLT_MAX;
  // up by what the sum may have lost to rounding and, element by element, to underflow
  const float width = static_cast<float>(matrix.width);
  block.longest = __builtin_sqrtf(largest) * (1 + (width + 16) * kUnit) + __builtin_sqrtf(width) * 0x1p-63f;
}

template <typename T>
void subtract(float* row, const T* code, int64_t width) {
  int64_t k = 0;
  for (; k + kWidth <= width; k += kWidth) store(row + k, load(row + k) - load(code + k));
  const int rest = static_cast<int>(width - k);
  if (rest > 0) store_first(row + k, load_first(row + k, rest) - load_first(code + k, rest), rest);
}

struct Winner {
  int32_t code;
  double score;
};

Winner settle_slot(const Search* searches, int64_t parts, int64_t slot, const float* row, const Matrix& codes,
                   Metric metric) {
  bool exactly = false;
  float lower = -__builtin_inff();
  for (int64_t part = 0; part < parts; ++part) {
    exactly |= searches[part].candidate_counts[slot] == kExact;
    if (searches[part].lower[slot] > lower) lower = searches[part].lower[slot];
  }
  Winner winner{-1, 0};
  if (exactly) {
    for (int64_t code = 0; code < codes.rows; ++code) {
      const double score = exact_score(row, codes, code, metric);
      if (winner.code < 0 || score < winner.score) winner = {static_cast<int32_t>(code), score};
    }
    return winner;
  }
  for (int64_t part = 0; part < parts; ++part) {
    const Candidate* candidates = searches[part].candidates + slot * kCandidates;
    for (int i = 0; i < searches[part].candidate_counts[slot]; ++i) {
      if (candidates[i].upper < lower) continue;
      const double score = exact_score(row, codes, candidates[i].code, metric);
      if (winner.code < 0 || score < winner.score) winner = {candidates[i].code, score};
    }
  }
  return winner;
}

}  // namespace

void pack_codes(const Matrix& codes, Metric metric, float* staging, CodeBlock& block) {
  switch (codes.element) {
    case Element::float16:
      return pack_typed(static_cast<const Half*>(codes.data), codes, metric, staging, block);
    case Element::bfloat16:
      return pack_typed(static_cast<const BFloat16*>(codes.data), codes, metric, staging, block);
    default:
      return pack_typed(static_cast<const float*>(codes.data), codes, metric, staging, block);
  }
}

void to_floats(const Matrix& matrix, int64_t first, int64_t count, float* rows) {
  for (int64_t i = first; i < first + count; ++i, rows += matrix.width) {
    const int64_t offset = i * matrix.stride;
    switch (matrix.element) {
      case Element::float16:
        floats_of(static_cast<const Half*>(matrix.data) + offset, matrix.width, rows);
        break;
      case Element::bfloat16:
        floats_of(static_cast<const BFloat16*>(matrix.data) + offset, matrix.width, rows);
        break;
      default:
        __builtin_memcpy(rows, static_cast<const float*>(matrix.data) + offset, matrix.width * sizeof(float));
    }
  }
}

void pack_tiles(const float* rows, const int32_t* index, int64_t count, int64_t width, float* tiles) {
  pack_rows(rows, index, count, width, tiles);
}

void begin_search(Search& search, int64_t width) {
  for (int64_t slot = 0; slot < search_slots(search.count); ++slot) {
    search.norm[slot] = 0;
    search.lower[slot] = search.reach[slot] = not_a_number();
    if (slot >= search.count) continue;
    const double square = squared_norm(search.rows + search.index[slot] * width, width);
    if (!(square < __builtin_inf())) {
      search.candidate_counts[slot] = kNotFinite;
    } else if (square >= static_cast<double>(kLargest) * kLargest) {
      search_exactly(search, slot);
    } else {
      search.candidate_counts[slot] = 0;
      search.norm[slot] = static_cast<float>(__builtin_sqrt(square) * (1 + 4 * kUnit));
      search.lower[slot] = -__builtin_inff();
    }
  }
}

void search_block(Search& search, const CodeBlock& block, const Matrix& codes, Metric metric, float* scratch) {
  begin_block(search, block, codes.width, metric);
  const int64_t depth = part_depth(codes.width);
  if (depth == codes.width) return sweep<true, true>(search, block, codes, metric, 0, scratch);
  sweep<true, false>(search, block, codes, metric, 0, scratch);
  int64_t part = depth;
  for (; part + depth < codes.width; part += depth) sweep<false, false>(search, block, codes, metric, part, scratch);
  sweep<false, true>(search, block, codes, metric, part, scratch);
}

void settle(const Search* searches, int64_t parts, int64_t begin, int64_t end, const Matrix& codes, Metric metric,
            float* rows, const Settled& settled) {
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t number = searches[0].index[slot];
    float* row = rows + number * codes.width;
    Winner winner{0, not_a_number()};
    if (searches[0].candidate_counts[slot] != kNotFinite) {
      winner = settle_slot(searches, parts, slot, row, codes, metric);
      if (metric == Metric::cosine) {
        const double square = squared_norm(row, codes.width);
        winner.score = 1 + (square > 0 ? winner.score / __builtin_sqrt(square) : 0);
      }
    }
    settled.codes[number * settled.stride] = winner.code;
    if (settled.distances) settled.distances[number * settled.stride] = static_cast<float>(winner.score);
    const int64_t offset = winner.code * codes.stride;
    switch (codes.element) {
      case Element::float16:
        subtract(row, static_cast<const Half*>(codes.data) + offset, codes.width);
        break;
      case Element::bfloat16:
        subtract(row, static_cast<const BFloat16*>(codes.data) + offset, codes.width);
        break;
      default:
        subtract(row, static_cast<const float*>(codes.data) + offset, codes.width);
    }
    if (settled.errors) settled.errors[number] += squared_norm(row, codes.width);
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
