// Nearest-code search: packed codes against packed rows, few rows against codes as they lie, and the choice of the
// winner. candidates.h says how a float32 search finds the float64 answer.
#include "nearest_kernel.h"

#include <cfloat>

#include "candidates.h"
#include "dot_tile.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

inline float sum_of_squares(const float* x, const float* centre, int64_t width) {
  Vec sum = zeros(), other = zeros();
  int64_t k = 0;
  for (; k + 2 * kWidth <= width; k += 2 * kWidth) {
    const Vec left = load(x + k) - centre_at(centre, k, kWidth);
    const Vec right = load(x + k + kWidth) - centre_at(centre, k + kWidth, kWidth);
    sum = fma(left, left, sum);
    other = fma(right, right, other);
  }
  for (; k < width; k += kWidth) {
    const int rest = static_cast<int>(smaller(kWidth, width - k));
    const Vec last = load_first(x + k, rest) - centre_at(centre, k, rest);
    sum = fma(last, last, sum);
  }
  return reduce_add(sum + other);
}

// Below this many floats the codes stay in a shared cache, where asking for them early only costs.
constexpr int64_t kCached = 2 << 20;

// One part of the width of all codes of a block. The scores of the parts before come from `scratch`, unless it is the
// first; with kCompare they are compared with the bounds, else they go to `scratch` [panels, tiles, kTileRows, kPanel].
template <bool kFirst, bool kCompare>
void sweep(Search& search, const CodeBlock& block, const Matrix& codes, Metric metric, int64_t part, float* scratch) {
  const int64_t num_tiles = (search.count + kTileRows - 1) / kTileRows, num_panels = panels_of(block.count);
  const int64_t depth = smaller(part_depth(codes.width), codes.width - part);
  // floats of the next panel that a tile asks for
  const int64_t ahead = codes.rows * codes.width > kCached ? round_up(depth * kPanel / num_tiles, 16) : 0;
  const float* panel = block.panels + part * num_panels * kPanel;
  const float* tiles = search.tiles + part * num_tiles * kTileRows;
  for (int64_t p = 0; p < num_panels; ++p, panel += depth * kPanel) {
    for (int64_t t = 0; t < num_tiles; ++t, scratch += kTileRows * kPanel) {
      prefetch(panel + depth * kPanel + t * ahead, ahead);
      Tile tile;
      if (kFirst) {
        start(block.bias + p * kPanel, tile);
      } else {
        load_tile(scratch, tile);
      }
      accumulate(tiles + t * depth * kTileRows, panel, depth, tile);
      if (!kCompare) {
        store_tile(scratch, tile);
        continue;
      }
      const float* threshold = search.threshold + t * kTileRows;
      Mask passed = max(tile[0][0], tile[0][1]) >= broadcast(threshold[0]);
#pragma GCC unroll 6
      for (int r = 1; r < kTileRows; ++r) passed = passed | (max(tile[r][0], tile[r][1]) >= broadcast(threshold[r]));
      if (__builtin_expect(any(passed), false)) {
        alignas(64) float scores[kTileRows * kPanel];
        store_tile(scores, tile);
        keep_tile(search, t * kTileRows, block.first + p * kPanel, scores, codes, metric);
      }
    }
  }
}

// The first block of codes that are searched in one part, tile by tile: while there is no bound, nearly every tile
// would cost a mispredicted branch.
void sweep_first(Search& search, const CodeBlock& block, const Matrix& codes, Metric metric) {
  const int64_t num_panels = panels_of(block.count), depth = codes.width;
  alignas(64) float scores[kTileRows * kBlockCodes];
  for (int64_t slot = 0; slot < search.count; slot += kTileRows) {
    for (int64_t p = 0; p < num_panels; ++p) {
      Tile tile;
      start(block.bias + p * kPanel, tile);
      accumulate(search.tiles + slot * depth, block.panels + p * depth * kPanel, depth, tile);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        store(scores + r * kBlockCodes + p * kPanel, tile[r][0]);
        store(scores + r * kBlockCodes + p * kPanel + kWidth, tile[r][1]);
      }
    }
    keep_block(search, slot, block.first, scores, num_panels, codes, metric);
  }
}

template <typename T>
void search_dots(Search& search, const T* book, CodeBlock& block, const Matrix& codes, Metric metric, float* scratch) {
  alignas(64) float squares[kBlockCodes];
  const T* first = book + block.first * codes.stride;
  if (search.centre) {
    dot_block<true>(search.tiles, search.count, first, codes.stride, block.count, codes.width, search.centre, scratch,
                    squares);
  } else {
    dot_block<false>(search.rows, search.count, first, codes.stride, block.count, codes.width, nullptr, scratch,
                     squares);
  }
  block.longest = longest_of(squares, block.count, codes.width);
  begin_block(search, block, codes.width, metric);
  const int64_t slots = round_up(search.count, kTileRows);
  for (int64_t slot = 0; slot < slots; ++slot) {
    float* scores = scratch + slot * kBlockCodes;
    for (int64_t i = slot < search.count ? block.count : 0; i < kBlockCodes; ++i) scores[i] = -FLT_MAX;
    if (metric != Metric::l2 || slot >= search.count) continue;
    for (int64_t i = 0; i < block.count; ++i) scores[i] -= squares[i] / 2;
  }
  for (int64_t slot = 0; slot < slots; slot += kTileRows) {
    keep_block(search, slot, block.first, scratch + slot * kBlockCodes, panels_of(block.count), codes, metric);
  }
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
  Score score;
};

Winner rerank_slot(const Search* searches, int64_t parts, int64_t slot, const float* row, const Matrix& codes,
                   Metric metric) {
  bool exactly = false;
  float lower = -__builtin_inff();
  for (int64_t part = 0; part < parts; ++part) {
    exactly |= searches[part].candidate_counts[slot] == kExact;
    if (searches[part].lower[slot] > lower) lower = searches[part].lower[slot];
  }
  Winner winner{-1, {}};
  const double row_square = squared_norm(row, codes.width);
  if (exactly) {
    for (int64_t code = 0; code < codes.rows; ++code) {
      const Score score = exact_score(row, codes, code, metric, row_square);
      if (winner.code < 0 || score.before(winner.score)) winner = {static_cast<int32_t>(code), score};
    }
    return winner;
  }
  for (int64_t part = 0; part < parts; ++part) {
    const Candidate* candidates = searches[part].candidates + slot * kCandidates;
    for (int i = 0; i < searches[part].candidate_counts[slot]; ++i) {
      if (candidates[i].upper < lower) continue;
      const Score score = exact_score(row, codes, candidates[i].code, metric, row_square);
      // of equal codes the lowest, whichever search has it
      const bool first = !winner.score.before(score) && candidates[i].code < winner.code;
      if (winner.code < 0 || score.before(winner.score) || first) winner = {candidates[i].code, score};
    }
  }
  return winner;
}

}  // namespace

void begin_search(Search& search, int64_t width) {
  search.begun = search.suspect = false;
  for (int64_t slot = 0; slot < search_slots(search.count); ++slot) {
    search.norm[slot] = 0;
    search.lower[slot] = search.threshold[slot] = kNotANumber;
    if (slot >= search.count) continue;
    const float* row = search.rows + search.index[slot] * width;
    // of what is multiplied: the row less the centre
    const float square = sum_of_squares(row, search.centre, width);
    float norm = length_bound(square, width);
    if (!(square < __builtin_inff())) {  // of a large row, or of one that is not finite
      double squares = 0;
      for (int64_t k = 0; k < width; ++k) {
        const double value = search.centre ? row[k] - search.centre[k] : row[k];
        squares += value * value;
      }
      norm = static_cast<float>(__builtin_sqrt(squares) * (1 + 4 * kUnit));
    }
    search.candidate_counts[slot] = 0;
    search.norm[slot] = norm;
    search.lower[slot] = -__builtin_inff();
    if (norm < kLargest) continue;
    search_exactly(search, slot);
    if (!(squared_norm(row, width) < __builtin_inf())) search.candidate_counts[slot] = kNotFinite;
  }
}

void search_block(Search& search, const CodeBlock& block, const Matrix& codes, Metric metric, float* scratch) {
  begin_block(search, block, codes.width, metric);
  const int64_t depth = part_depth(codes.width), last = (codes.width - 1) / depth * depth;
  const bool begun = search.begun;
  search.begun = true;
  if (!begun && last == 0) return sweep_first(search, block, codes, metric);
  if (last > 0) sweep<true, false>(search, block, codes, metric, 0, scratch);
  for (int64_t part = depth; part < last; part += depth) {
    sweep<false, false>(search, block, codes, metric, part, scratch);
  }
  if (last > 0) return sweep<false, true>(search, block, codes, metric, last, scratch);
  sweep<true, true>(search, block, codes, metric, 0, scratch);
}

void search_unpacked(Search& search, CodeBlock& block, const Matrix& codes, Metric metric, float* scratch) {
  switch (codes.element) {
    case Element::float16:
      return search_dots(search, static_cast<const Half*>(codes.data), block, codes, metric, scratch);
    case Element::bfloat16:
      return search_dots(search, static_cast<const BFloat16*>(codes.data), block, codes, metric, scratch);
    default:
      return search_dots(search, static_cast<const float*>(codes.data), block, codes, metric, scratch);
  }
}

void rerank(const Search* searches, int64_t parts, int64_t begin, int64_t end, const Matrix& codes, Metric metric,
            float* rows, const Reranked& reranked) {
  for (int64_t slot = begin; slot < end; ++slot) {
    const int64_t number = searches[0].index[slot];
    float* row = rows + number * codes.width;
    int32_t code = 0;
    double distance = kNotANumber;
    if (searches[0].candidate_counts[slot] != kNotFinite) {
      const Winner winner = rerank_slot(searches, parts, slot, row, codes, metric);
      if (winner.code >= 0)
        code = winner.code, distance = winner.score.value;  // else no code is finite: the caller says so
      if (metric == Metric::cosine) {
        const double square = squared_norm(row, codes.width);
        distance = 1 + (square > 0 ? distance / __builtin_sqrt(square) : 0);
      }
    }
    reranked.codes[number * reranked.stride] = code;
    if (reranked.distances) reranked.distances[number * reranked.stride] = static_cast<float>(distance);
    if (reranked.last) continue;
    const int64_t offset = code * codes.stride;
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
    if (reranked.errors) reranked.errors[number] += squared_norm(row, codes.width);
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
