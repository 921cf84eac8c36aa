// Second kernel of the LoRA decode path: y = x Wᵀ + bias + low_rank Bᵀ in one pass over W, y written once.
#pragma once

#include "device.cuh"
#include "lora_decode.h"
#include "lora_decode_base.cuh"
#include "lora_decode_shrink.cuh"

namespace ztok {

// B lies far from what the block has read so far; it is asked for while W streams by.
template <int kOut>
__device__ __forceinline__ void prefetch_B(const LoraDecode& d, const int* adapters, int64_t first_out) {
  const int64_t element = d.float_adapters ? 4 : 2;
  const int64_t outputs = d.out - first_out < kOut ? d.out - first_out : kOut;
  const int64_t bytes = outputs * d.rank * element;
  for (int m = 0; m < d.rows; ++m) {
    // Once per run of rows with one adapter; an adapter with two runs is asked for twice, which costs little.
    if (adapters[m] < 0 || (m > 0 && adapters[m] == adapters[m - 1])) continue;
    const char* rows =
        static_cast<const char*>(d.B) + (static_cast<int64_t>(adapters[m]) * d.out + first_out) * d.rank * element;
    for (int64_t i = static_cast<int64_t>(threadIdx.x) * 128; i < bytes; i += 32 * kLoraWarps * 128) {
      prefetch_to_l2(rows + i);
    }
  }
}

// Adds the sums of the kWarpsIn warps that divided the input, always in the same order; the first warps end with them.
template <typename Shape>
__device__ __forceinline__ void sum_over_warps(LoraSums<Shape::kWarpRowTiles>& sums, float* shared, int warp,
                                               int lane) {
  constexpr int kTeam = kLoraWarps / Shape::kWarpsIn;  // warps with inputs in common
  float* flat = &sums[0][0][0];
#pragma unroll
  for (int half = Shape::kWarpsIn / 2; half > 0; half /= 2) {
    const int part = warp / kTeam;
    float* slot = shared + (warp % (kTeam * half)) * Shape::kLaneFloats * 32 + lane;
    if (part >= half && part < 2 * half) {
#pragma unroll
      for (int i = 0; i < Shape::kLaneFloats; ++i) slot[i * 32] = flat[i];
    }
    __syncthreads();
    if (part < half) {
#pragma unroll
      for (int i = 0; i < Shape::kLaneFloats; ++i) flat[i] += slot[i * 32];
    }
    __syncthreads();
  }
}

// Where sum `i` of a lane of the team's warp `member` stands in the block's tile [rows][outputs].
template <typename Shape>
__device__ __forceinline__ int place_in_tile(int member, int lane, int i) {
  const int f = i / (4 * Shape::kWarpRowTiles), tile = i / 4 % Shape::kWarpRowTiles;
  const int out = member % Shape::kWarpsOut * 32 + 16 * f + lane / 4 + i % 4 / 2 * 8;
  const int row = (member / Shape::kWarpsOut * Shape::kWarpRowTiles + tile) * 8 + lane % 4 * 2 + i % 2;
  return row * Shape::kTileStride + out;
}

// Puts the block's sums into shared memory as [rows][outputs]. With a split input the block that comes last does so for
// all splits, adding in the order of the splits, whoever it is. Returns false in the blocks that came before it.
template <typename Shape>
__device__ __forceinline__ bool gather_tile(const LoraDecode& d, const LoraSums<Shape::kWarpRowTiles>& sums,
                                            float* shared, int warp, int lane) {
  constexpr int kTeam = kLoraWarps / Shape::kWarpsIn;
  const float* flat = &sums[0][0][0];
  if (d.splits == 1) {
    if (warp < kTeam) {
#pragma unroll
      for (int i = 0; i < Shape::kLaneFloats; ++i) shared[place_in_tile<Shape>(warp, lane, i)] = flat[i];
    }
    __syncthreads();
    return true;
  }
  float* partials = d.partials + static_cast<int64_t>(blockIdx.x) * d.splits * Shape::kTileFloats;
  if (warp < kTeam) {
    float* own = partials + static_cast<int64_t>(blockIdx.y) * Shape::kTileFloats + warp * Shape::kLaneFloats * 32;
#pragma unroll
    for (int i = 0; i < Shape::kLaneFloats; ++i) own[i * 32 + lane] = flat[i];
  }
  __threadfence();
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) last = atomicAdd(d.arrivals + blockIdx.x, 1) == d.splits - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int i = warp; i < kTeam * Shape::kLaneFloats; i += kLoraWarps) {
    float total = 0.0f;
    for (int split = 0; split < d.splits; ++split) {
      total += load_shared_between_blocks(partials + static_cast<int64_t>(split) * Shape::kTileFloats + i * 32 + lane);
    }
    shared[place_in_tile<Shape>(i / Shape::kLaneFloats, lane, i % Shape::kLaneFloats)] = total;
  }
  __syncthreads();
  return true;
}

// Eight elements of a row of B, zero past `rank`.
template <typename AdapterT>
__device__ __forceinline__ void load_B(const AdapterT* row, int r, int rank, bool aligned, float (&b)[8]) {
  if (aligned) {
#pragma unroll
    for (int part = 0; part < 8; part += Vector<AdapterT>::kSize) {
      const auto v = load_vector<AdapterT, true, true>(row, r + part, rank);
#pragma unroll
      for (int i = 0; i < Vector<AdapterT>::kSize; ++i) b[part + i] = v[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) b[i] = r + i < rank ? to_float(row[r + i]) : 0.0f;
  }
}

// sums[m] += low_rank[m] . B[output of this thread] for `kRows` rows of one adapter, over one slab of ranks.
template <int kRows, int kSlab, typename AdapterT>
__device__ __forceinline__ void add_slab(float* sums, const float* slab, const AdapterT* row, int first, int rank,
                                         bool aligned) {
  const int ranks = rank - first < kSlab ? rank - first : kSlab;
#pragma unroll 2
  for (int r = 0; r < ranks; r += 8) {
    float b[8];
    load_B(row, first + r, rank, aligned, b);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 u = *reinterpret_cast<const float4*>(slab + m * kSlab + r + i);
        sums[m] += u.x * b[i] + u.y * b[i + 1] + u.z * b[i + 2] + u.w * b[i + 3];
      }
    }
  }
}

// The low-rank product of this thread's output and its kRows rows, first_row on. One adapter for all of them: B is read
// once. Otherwise row by row, so that what an adapter holds never touches the rows of another. The choice is the same
// in all lanes of a warp, which differ in the output only.
template <typename Shape, int kRows, typename AdapterT>
__device__ __forceinline__ void add_low_rank(const LoraDecode& d, float (&sums)[kRows], float* slab,
                                             const int* adapters, int64_t output, int first_row) {
  const int first_adapter = adapters[first_row];
  bool uniform = first_adapter >= 0;
#pragma unroll
  for (int m = 1; m < kRows; ++m) uniform &= first_row + m >= d.rows || adapters[first_row + m] == first_adapter;
  const auto row_of_B = [&](int adapter) {
    return static_cast<const AdapterT*>(d.B) + (adapter * d.out + output) * d.rank;
  };
  for (int first = 0; first < d.rank; first += Shape::kSlab) {
    __syncthreads();
    for (int i = threadIdx.x; i < Shape::kRows * Shape::kSlab; i += 32 * kLoraWarps) {
      const int m = i / Shape::kSlab, r = first + i % Shape::kSlab;
      // Rows without an adapter were never written.
      slab[i] = r < d.rank && adapters[m] >= 0
                    ? load_shared_between_blocks(d.low_rank + static_cast<int64_t>(m) * d.rank + r)
                    : 0.0f;
    }
    __syncthreads();
    if (output >= d.out) continue;
    const float* own = slab + first_row * Shape::kSlab;
    if (uniform) {
      add_slab<kRows, Shape::kSlab>(sums, own, row_of_B(first_adapter), first, d.rank, d.aligned_B);
    } else {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const int adapter = adapters[first_row + m];
        if (adapter < 0) continue;
        add_slab<1, Shape::kSlab>(sums + m, own + m * Shape::kSlab, row_of_B(adapter), first, d.rank, d.aligned_B);
      }
    }
  }
}

// Grid: [tiles of outputs, splits of the input]; dynamic shared memory: Shape::kSharedBytes.
template <typename T, int kRowTiles, bool kAligned>
__global__ void __launch_bounds__(32 * kLoraWarps, kLoraBlocks<T, kRowTiles>)
    lora_decode_kernel(LoraDecode d, int64_t steps, int64_t steps_per_split) {
  using Shape = LoraShape<sizeof(T) == 2, kRowTiles>;
  constexpr int kTeam = kLoraWarps / Shape::kWarpsIn;
  __shared__ int adapters[Shape::kRows];
  float* shared = shared_floats();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_out = static_cast<int64_t>(blockIdx.x) * Shape::kOut;
  if (threadIdx.x < Shape::kRows) adapters[threadIdx.x] = adapter_of_row(d, threadIdx.x);
  __syncthreads();
  if (blockIdx.y == 0) prefetch_B<Shape::kOut>(d, adapters, first_out);

  const int member = warp % kTeam;
  const int64_t warp_out = first_out + member % Shape::kWarpsOut * 32;
  const int warp_row = member / Shape::kWarpsOut * Shape::kWarpRowTiles * 8;
  const int64_t first_step = blockIdx.y * steps_per_split;
  const int64_t last_step = first_step + steps_per_split < steps ? first_step + steps_per_split : steps;
  LoraProduct<T, Shape::kWarpRowTiles> product;
  lora_base_product<T, Shape::kWarpRowTiles, Shape::kChunksPerStep, kAligned>(
      product, static_cast<const T*>(d.weight) + warp_out * d.weight_stride, d.weight_stride, d.out - warp_out,
      static_cast<const T*>(d.x) + warp_row * d.x_stride, d.x_stride, d.rows - warp_row, d.in,
      first_step + warp / kTeam, last_step, Shape::kWarpsIn, lane);
  sum_over_warps<Shape>(product.sums, shared, warp, lane);

  // From here on what the first kernel wrote is needed: the counters and the low-rank rows.
  wait_for_kernel_before();
  if (!gather_tile<Shape>(d, product.sums, shared, warp, lane)) return;

  constexpr int kGroups = 32 * kLoraWarps / Shape::kOut;  // threads that share an output
  constexpr int kThreadRows = Shape::kRows / kGroups;
  const int column = threadIdx.x % Shape::kOut, first_row = threadIdx.x / Shape::kOut * kThreadRows;
  const int64_t output = first_out + column;
  const float bias = d.bias != nullptr && output < d.out ? to_float(static_cast<const T*>(d.bias)[output]) : 0.0f;
  float sums[kThreadRows];
#pragma unroll
  for (int m = 0; m < kThreadRows; ++m) sums[m] = shared[(first_row + m) * Shape::kTileStride + column] + bias;
  float* slab = shared + Shape::kRows * Shape::kTileStride;
  if (d.float_adapters) {
    add_low_rank<Shape, kThreadRows, float>(d, sums, slab, adapters, output, first_row);
  } else {
    add_low_rank<Shape, kThreadRows, T>(d, sums, slab, adapters, output, first_row);
  }
  if (output >= d.out) return;
#pragma unroll
  for (int m = 0; m < kThreadRows; ++m) {
    if (first_row + m < d.rows) {
      static_cast<T*>(d.y)[static_cast<int64_t>(first_row + m) * d.out + output] = from_float<T>(sums[m]);
    }
  }
}

}  // namespace ztok
