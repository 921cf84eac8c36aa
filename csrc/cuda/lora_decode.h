// Arguments and launch plan of the LoRA decode kernels: plain C++, shared by the launcher and the host tests.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ztok {

constexpr int kLoraMaxRows = 64;
constexpr int kLoraWarps = 8;  // per block, in both kernels

// y = x Wᵀ + bias + s (x Aᵀ) Bᵀ. Row strides in elements; A [n, rank, in] and B [n, out, rank] are contiguous.
struct LoraDecode {
  const void* x;  // [rows, in]
  int64_t x_stride;
  const void* weight;  // [out, in]
  int64_t weight_stride;
  const void* bias;  // [out] or null
  const void* A;
  const void* B;
  bool float_adapters;      // A and B are float32, whatever x is
  bool aligned_B;           // every row of B begins on 16 bytes and is a multiple of 8 elements
  const float* scaling;     // [n]
  const int32_t* adapters;  // [rows], or [sequences] with cu_seqlens, or null: adapter 0
  const void* cu_seqlens;   // [sequences + 1] or null
  bool wide_offsets;        // cu_seqlens is int64
  int64_t sequences;
  int rows, num_adapters, rank;
  int64_t in, out;
  void* y;            // [rows, out], contiguous
  float* low_rank;    // [rows, rank]: s x Aᵀ, written by the first kernel
  float* partials;    // [tiles, splits, tile floats], only with splits > 1
  int32_t* arrivals;  // [tiles], set to zero by the first kernel
  int32_t splits;
};

// How a block of the second kernel is arranged, for rows in tiles of 8.
//   half precision: a warp's tensor-core tile is 32 outputs x all rows; warps divide the input first.
//   float32: each thread multiplies 4 outputs x 16 rows by itself, so more rows take more warps, which read the same
//   weights at about the same time (the later ones hit the cache).
template <bool kHalf, int kRowTiles>
struct LoraShape {
  static constexpr int kWarpsOut = kHalf && kRowTiles >= 4 ? 2 : 1;
  static constexpr int kWarpsRows = !kHalf && kRowTiles > 2 ? kRowTiles / 2 : 1;
  static constexpr int kWarpsIn = kLoraWarps / kWarpsOut / kWarpsRows;
  static constexpr int kWarpRowTiles = kRowTiles / kWarpsRows;
  static constexpr int kOut = 32 * kWarpsOut;  // outputs of a block
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kChunk = kHalf ? 32 : 16;  // inputs: 4 lanes x 16 bytes
  // Loads in flight against registers: a warp asks for 2 KB of W per chunk, a multiprocessor for 32 KB or more at once.
  static constexpr int kChunksPerStep = kHalf && kRowTiles == 1 ? 4 : 2;
  static constexpr int kBlocksPerMultiprocessor = (kHalf ? kRowTiles >= 8 : kRowTiles >= 2) ? 1 : 2;
  static constexpr int kLaneFloats = 8 * kWarpRowTiles;  // sums per lane: 2 x 16 outputs x 8 rows per tile, 32 lanes
  static constexpr int kTileFloats = kOut * kRows;
  static constexpr int kTileStride = kOut + 4;  // of a row of sums in shared memory; + 4 spreads them over the banks
  static constexpr int kSlab = 64;              // ranks of the low-rank product that shared memory holds at a time
  static constexpr int kReduceFloats = kTileFloats * (kWarpsIn / 2);
  static constexpr int kEpilogueFloats = kRows * (kTileStride + kSlab);
  static constexpr int kSharedBytes = 4 * (kReduceFloats > kEpilogueFloats ? kReduceFloats : kEpilogueFloats);
  static_assert(kSharedBytes <= 46 * 1024, "static limit of shared memory, less the adapters of the rows");
};

template <typename T, int kRowTiles>
constexpr int kLoraBlocks = LoraShape<sizeof(T) == 2, kRowTiles>::kBlocksPerMultiprocessor;

struct LoraPlan {
  int64_t tiles;
  int32_t splits;
  int64_t steps_per_split;
  int64_t scratch_floats;  // low_rank, partials and arrivals together
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits the input over blocks where the outputs alone leave multiprocessors idle, or the last wave almost empty: the
// number of splits for which the busiest multiprocessor has the fewest steps. A split costs about two steps of its own
// (partial sums through L2).
template <typename Shape>
LoraPlan lora_plan(int64_t rows, int64_t in, int64_t out, int64_t rank, int multiprocessors) {
  constexpr int64_t kMaxSplits = 16;
  const int64_t tiles = ceil_div(out, Shape::kOut);
  const int64_t steps = ceil_div(in, Shape::kChunk * Shape::kChunksPerStep);
  const int64_t slots = int64_t{multiprocessors} * Shape::kBlocksPerMultiprocessor;
  LoraPlan plan{tiles, 1, steps, 0};
  int64_t best = 0;
  for (int64_t splits = 1; splits <= kMaxSplits; ++splits) {
    const int64_t per_warp = ceil_div(ceil_div(steps, splits), Shape::kWarpsIn);
    const int64_t cost = ceil_div(tiles * splits, slots) * (per_warp + 2) + (splits > 1 ? 2 : 0);
    if (splits > 1 && (cost >= best || steps < splits * Shape::kWarpsIn)) continue;
    best = cost;
    plan.splits = static_cast<int32_t>(splits);
  }
  plan.steps_per_split = ceil_div(steps, plan.splits);
  plan.scratch_floats = ceil_div(rows * rank, 4) * 4 + ceil_div(tiles, 4) * 4 +
                        (plan.splits > 1 ? tiles * plan.splits * Shape::kTileFloats : 0);
  return plan;
}

// Places the scratch in the arguments: [low_rank | arrivals | partials], each on 16 bytes.
inline void place_scratch(LoraDecode& d, const LoraPlan& plan, float* scratch) {
  d.low_rank = scratch;
  d.arrivals = reinterpret_cast<int32_t*>(scratch + ceil_div(int64_t{d.rows} * d.rank, 4) * 4);
  d.partials = reinterpret_cast<float*>(d.arrivals) + ceil_div(plan.tiles, 4) * 4;
  d.splits = plan.splits;
}

}  // namespace ztok
