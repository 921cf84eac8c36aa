// Drives nearest-code search: cuts rows and codes into cache-sized blocks and shares them among threads.
#include "nearest.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "buffer.h"
#include "nearest_kernel.h"
#include "nearest_row_kernel.h"
#include "pack_kernel.h"
#include "share.h"

namespace ztok {
namespace {

// Packed rows of a block, or those of one part of the width: half of a 512 KB L2 cache.
constexpr int64_t kRowBytes = 256 * 1024;
constexpr int64_t kMaxBlockRows = 192;  // beyond this a code panel in L1 is used often enough

// Up to so many rows, codes are read where they lie: packing them would take longer than it saves. Wide codes are read
// from a cache further away, and 16-bit ones are converted each time.
int64_t unpacked_rows(const Matrix& codes) {
  const bool wide = codes.width >= 256;
  return codes.element == Element::float32 ? (wide ? 36 : 9) : (wide ? 12 : 6);
}

int64_t blocks_of(int64_t codes) { return (codes + kBlockCodes - 1) / kBlockCodes; }

// The floats of a packed block: panels are padded to their width, of which a block is a multiple.
int64_t block_floats(int64_t width) { return kBlockCodes * width; }

struct Problem {
  const Matrix& rows;
  const Codebooks& codebooks;
  Metric metric;
  const LevelCounts& levels;
  const SearchResult& result;
};

// What the search of one row block needs; its arrays are reused from block to block.
struct RowBlock {
  RowBlock(const Problem& problem, int64_t capacity)
      : rows(capacity * problem.rows.width), tiles(search_slots(capacity) * problem.rows.width + 64), index(capacity) {}

  void load(const Problem& problem, int64_t first_row, int64_t num_rows) {
    first = first_row;
    count = num_rows;
    ZTOK_SELECT(to_floats)(problem.rows, first, count, rows.get());
  }

  // Finds the rows that use a level.
  int64_t choose(const Problem& problem, int64_t level) {
    active = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (problem.levels.of(first + i, problem.codebooks.levels) > level) index[active++] = static_cast<int32_t>(i);
    }
    return active;
  }

  // Packs them.
  void pack(const Problem& problem, const float* centre) {
    ZTOK_SELECT(pack_tiles)(rows.get(), index.get(), active, problem.rows.width, centre, tiles.get());
  }

  Reranked reranked(const Problem& problem, int64_t level) const {
    const int64_t levels = problem.codebooks.levels, offset = first * levels + level;
    const SearchResult& result = problem.result;
    return {result.codes + offset, result.distances ? result.distances + offset : nullptr, levels,
            result.errors ? result.errors + first : nullptr, level + 1 == levels && !result.errors};
  }

  Buffer<float> rows, tiles;
  Buffer<int32_t> index;
  int64_t first = 0, count = 0, active = 0;
};

// The state of one search of a row block.
struct SearchState {
  explicit SearchState(int64_t capacity)
      : floats(4 * search_slots(capacity)),
        counts(search_slots(capacity)),
        candidates(capacity * kCandidates),
        scratch(kBlockCodes * search_slots(capacity)),
        slots(search_slots(capacity)) {}

  void begin(const RowBlock& block, const float* centre, int64_t width) {
    search = {block.rows.get(), block.index.get(), block.tiles.get(), centre, block.active};
    search.norm = floats.get();
    search.lower = floats.get() + slots;
    search.error_bound = floats.get() + 2 * slots;
    search.threshold = floats.get() + 3 * slots;
    search.candidate_counts = counts.get();
    search.candidates = candidates.get();
    ZTOK_SELECT(begin_search)(search, width);
  }

  Buffer<float> floats;
  Buffer<int32_t> counts;
  Buffer<Candidate> candidates;
  Buffer<float> scratch;
  int64_t slots;
  Search search{};
};

// Memory for one packed block, and the staging area that cosine needs.
struct Packer {
  Packer(const Problem& problem, bool with_panels)
      : panels(with_panels ? block_floats(problem.rows.width) : 0),
        staging(problem.metric == Metric::cosine ? block_floats(problem.rows.width) : 0),
        bias(kBlockCodes) {}

  CodeBlock& pack(const Problem& problem, const Matrix& codes, const float* centre, int64_t number, float* panels_out,
                  float* bias_out) {
    const int64_t first = number * kBlockCodes;
    block = {panels_out, bias_out, 0, first, std::min<int64_t>(kBlockCodes, codes.rows - first)};
    ZTOK_SELECT(pack_codes)(codes, problem.metric, centre, staging.get(), block);
    return block;
  }

  Buffer<float> panels, staging, bias;
  CodeBlock block{};
};

// A vector amid the codes of each level, for l2: the mean of some. Any would do; see candidates.h.
class Centres {
 public:
  explicit Centres(const Problem& problem)
      : width_(problem.metric == Metric::l2 ? problem.rows.width : 0), values_(problem.codebooks.levels * width_) {
    if (width_ == 0) return;
    constexpr int64_t kSamples = 32;
    Buffer<float> code(width_);
    for (int64_t l = 0; l < problem.codebooks.levels; ++l) {
      const Matrix codes = problem.codebooks.level(l);
      const int64_t samples = std::min(kSamples, codes.rows);
      float* mean = values_.get() + l * width_;
      std::fill_n(mean, width_, 0.0f);
      for (int64_t i = 0; i < samples; ++i) {
        ZTOK_SELECT(to_floats)(codes, i * codes.rows / samples, 1, code.get());
        for (int64_t k = 0; k < width_; ++k) mean[k] += code[k] / static_cast<float>(samples);
      }
    }
  }

  const float* of(int64_t level) const { return width_ > 0 ? values_.get() + level * width_ : nullptr; }

 private:
  int64_t width_;
  Buffer<float> values_;
};

bool all_finite(const Codebooks& codebooks) {
  const int64_t width = codebooks.first.width;
  Buffer<float> code(width);
  for (int64_t l = 0; l < codebooks.levels; ++l) {
    const Matrix codes = codebooks.level(l);
    for (int64_t row = 0; row < codes.rows; ++row) {
      ZTOK_SELECT(to_floats)(codes, row, 1, code.get());
      if (!std::all_of(code.get(), code.get() + width, [](float value) { return std::isfinite(value); })) return false;
    }
  }
  return true;
}

// Many rows: all codes are packed once, each thread takes row blocks and searches all levels of one while it is in
// cache. False if a code is not finite.
bool search_many(const Problem& problem, int64_t block_rows) {
  const int64_t width = problem.rows.width, levels = problem.codebooks.levels;
  const int64_t blocks = blocks_of(problem.codebooks.first.rows);
  Buffer<float> panels(levels * blocks * block_floats(width)), bias(levels * blocks * kBlockCodes);
  std::vector<CodeBlock> packed(levels * blocks);
  const Centres centres(problem);
  const double elements = static_cast<double>(levels) * blocks * block_floats(width);
  share(levels * blocks, 1, 8 * elements / kBytesPerNanosecond, [&](int64_t begin, int64_t end) {
    Packer packer(problem, false);
    for (int64_t i = begin; i < end; ++i) {
      packed[i] = packer.pack(problem, problem.codebooks.level(i / blocks), centres.of(i / blocks), i % blocks,
                              panels.get() + i * block_floats(width), bias.get() + i * kBlockCodes);
    }
  });
  const bool suspect =
      std::any_of(packed.begin(), packed.end(), [](const CodeBlock& b) { return !(b.longest < HUGE_VALF); });
  if (suspect && !all_finite(problem.codebooks)) return false;
  // Blocks of equal size, whole register tiles each.
  const int64_t tiles = (problem.rows.rows + kTileRows - 1) / kTileRows, most = block_rows / kTileRows;
  const int64_t row_blocks = (tiles + most - 1) / most;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), row_blocks);
  share_among(threads, row_blocks, 1, [&](int64_t, const auto& claims) {
    RowBlock block(problem, block_rows);
    SearchState state(block_rows);
    claims([&](int64_t i, int64_t) {
      const int64_t first = tiles * i / row_blocks * kTileRows, last = tiles * (i + 1) / row_blocks * kTileRows;
      block.load(problem, first, std::min(last, problem.rows.rows) - first);
      for (int64_t level = 0; level < levels; ++level) {
        const Matrix codes = problem.codebooks.level(level);
        block.choose(problem, level);
        block.pack(problem, centres.of(level));
        state.begin(block, centres.of(level), width);
        for (int64_t b = 0; b < blocks; ++b) {
          ZTOK_SELECT(search_block)(state.search, packed[level * blocks + b], codes, problem.metric,
                                    state.scratch.get());
        }
        ZTOK_SELECT(rerank)(&state.search, 1, 0, state.search.count, codes, problem.metric, block.rows.get(),
                            block.reranked(problem, level));
      }
    });
  });
  return true;
}

// Few rows: they are one block, and the threads share the codes, each packing a block of its own just before it is
// used, or for very few rows none at all. False if a code is not finite.
bool search_few(const Problem& problem) {
  const int64_t width = problem.rows.width, num_rows = problem.rows.rows;
  const int64_t blocks = blocks_of(problem.codebooks.first.rows);
  // For one row and a small codebook a sleeping thread wakes when the work is done.
  const double elements = static_cast<double>(problem.codebooks.first.rows) * width;
  const double nanoseconds = elements * (num_rows / kProductsPerNanosecond + 4 / kBytesPerNanosecond);
  const int64_t threads = std::min(threads_for(nanoseconds), blocks);
  RowBlock block(problem, num_rows);
  block.load(problem, 0, num_rows);
  const Centres centres(problem);
  const bool may_unpack = num_rows <= unpacked_rows(problem.codebooks.first) && problem.metric != Metric::cosine;
  std::vector<SearchState> states;
  std::vector<Packer> packers;
  for (int64_t thread = 0; thread < threads; ++thread) {
    states.emplace_back(num_rows);
    packers.emplace_back(problem, !may_unpack || problem.levels.data != nullptr);
  }
  std::vector<Search> searches(threads);
  bool suspect = false;
  for (int64_t level = 0; level < problem.codebooks.levels; ++level) {
    const Matrix codes = problem.codebooks.level(level);
    const float* centre = centres.of(level);
    const bool unpacked = block.choose(problem, level) == num_rows && may_unpack;
    if (!unpacked) {
      block.pack(problem, centre);
    } else if (centre) {
      ZTOK_SELECT(centre_rows)(block.rows.get(), num_rows, width, centre, block.tiles.get());
    }
    const auto search = [&](int64_t thread, const auto& claims) {
      SearchState& state = states[thread];
      Packer& packer = packers[thread];
      state.begin(block, centre, width);
      claims([&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          if (unpacked) {
            CodeBlock block_of_codes{nullptr, nullptr, 0, b * kBlockCodes,
                                     std::min<int64_t>(kBlockCodes, codes.rows - b * kBlockCodes)};
            ZTOK_SELECT(search_unpacked)(state.search, block_of_codes, codes, problem.metric, state.scratch.get());
            continue;
          }
          CodeBlock& packed = packer.pack(problem, codes, centre, b, packer.panels.get(), packer.bias.get());
          ZTOK_SELECT(search_block)(state.search, packed, codes, problem.metric, state.scratch.get());
        }
      });
      searches[thread] = state.search;
    };
    if (threads == 1) {
      search(0, [&](const auto& body) { body(0, blocks); });
    } else {
      share_among(threads, blocks, 4, search);
    }
    ZTOK_SELECT(rerank)(searches.data(), threads, 0, block.active, codes, problem.metric, block.rows.get(),
                        block.reranked(problem, level));
    for (const Search& search : searches) suspect |= search.suspect;
  }
  return !suspect || all_finite(problem.codebooks);
}

// One row by squared distance, all levels. False where float32 distances overflow, are next to zero, or
// are not numbers: the general search sorts those out.
bool search_row(const Problem& problem) {
  const int64_t width = problem.rows.width, size = problem.codebooks.first.rows, levels = problem.codebooks.levels;
  thread_local Scratch scratch;
  float* row = scratch.get(round_up(width, 16) + size);
  float* distances = row + round_up(width, 16);
  ZTOK_SELECT(to_floats)(problem.rows, 0, 1, row);
  const double nanoseconds = static_cast<double>(size) * width * 4 / kBytesPerNanosecond;
  // A distance has a rounding for the difference, its square and each addition; all terms are positive. Twice that, for
  // the least and the one compared with it, and some for what is done with the bound.
  const float tolerance = 1 + 1.01f * 0x1p-24f * static_cast<float>(2 * width + 40);
  for (int64_t level = 0; level < levels; ++level) {
    const Matrix codes = problem.codebooks.level(level);
    const int64_t threads = std::min(threads_for(nanoseconds), blocks_of(size));
    float least = HUGE_VALF;
    if (threads == 1) {
      least = ZTOK_SELECT(row_distances)(row, codes, 0, size, distances);
    } else {
      std::vector<float> found(threads, HUGE_VALF);
      share_among(threads, blocks_of(size), 4, [&](int64_t thread, const auto& claims) {
        claims([&](int64_t begin, int64_t end) {
          const float here =
              ZTOK_SELECT(row_distances)(row, codes, begin * kBlockCodes, std::min(end * kBlockCodes, size), distances);
          if (!(here >= found[thread])) found[thread] = here;  // keeps a NaN
          if (std::isnan(here)) found[thread] = -HUGE_VALF;
        });
      });
      for (const float here : found) least = std::min(least, here);
    }
    if (!(least > 0x1p-60f && least < 0x1p120f)) return false;
    const NearestCode nearest = ZTOK_SELECT(rerank_row)(row, codes, distances, least * tolerance);
    problem.result.codes[level] = nearest.code;
    if (problem.result.distances != nullptr) problem.result.distances[level] = static_cast<float>(nearest.distance);
    if (problem.result.errors != nullptr) problem.result.errors[0] += ZTOK_SELECT(row_square)(row, width);
  }
  return true;
}

}  // namespace

Matrix Codebooks::level(int64_t l) const {
  Matrix matrix = first;
  const int64_t bytes = matrix.element == Element::float32 ? 4 : 2;
  matrix.data = static_cast<const char*>(matrix.data) + l * level_stride * bytes;
  return matrix;
}

bool search_codes(const Matrix& rows, const Codebooks& codebooks, Metric metric, const LevelCounts& levels,
                  const SearchResult& result) {
  if (rows.rows == 0) return all_finite(codebooks);
  if (levels.data != nullptr) std::fill_n(result.codes, rows.rows * codebooks.levels, -1);
  if (result.errors != nullptr) std::fill_n(result.errors, rows.rows, 0.0);
  const Problem problem{rows, codebooks, metric, levels, result};
  if (rows.rows == 1 && metric == Metric::l2 && levels.data == nullptr) {
    if (search_row(problem)) return true;
    if (result.errors != nullptr) result.errors[0] = 0;
  }
  const int64_t depth = part_depth(rows.width);
  const int64_t fitting = std::max<int64_t>(kTileRows, kRowBytes / (4 * depth) / kTileRows * kTileRows);
  if (rows.rows <= fitting) return search_few(problem);
  return search_many(problem, std::min(kMaxBlockRows, fitting));
}

}  // namespace ztok
