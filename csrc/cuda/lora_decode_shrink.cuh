// First kernel of the LoRA decode path: low_rank[m] = s x[m] Aᵀ with the adapter of row m, fp32 throughout.
#pragma once

#include "device.cuh"
#include "lora_decode.h"

namespace ztok {

constexpr int kShrinkRanks = 4;  // of one adapter, per block
constexpr int kShrinkRows = 8;   // per block

// The adapter of a row, -1 for none. What cannot be checked without a synchronisation, an adapter or an offset out of
// range, counts as none and reads nothing out of bounds.
__device__ __forceinline__ int adapter_of_row(const LoraDecode& d, int row) {
  if (row >= d.rows) return -1;
  if (d.adapters == nullptr) return 0;
  int64_t index = row;
  if (d.cu_seqlens != nullptr) {
    const auto offset = [&](int64_t i) {
      return d.wide_offsets ? static_cast<const int64_t*>(d.cu_seqlens)[i]
                            : static_cast<int64_t>(static_cast<const int32_t*>(d.cu_seqlens)[i]);
    };
    int64_t low = 0, high = d.sequences;  // the last sequence that begins at or before the row
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (offset(middle) <= row ? low : high) = middle;
    }
    if (d.sequences == 0 || row < offset(low) || row >= offset(low + 1)) return -1;
    index = low;
  }
  const int adapter = d.adapters[index];
  return adapter >= 0 && adapter < d.num_adapters ? adapter : -1;
}

// Elements [first, first + kSize) of a row as floats, zero past its end.
template <bool kAligned, bool kStreaming, typename T, int kSize>
__device__ __forceinline__ void load_floats(const T* row, int64_t first, int64_t length, float (&out)[kSize]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int part = 0; part < kSize; part += Vector<T>::kSize) {
      const auto v = load_vector<T, true, kStreaming>(row, first + part, length);
#pragma unroll
      for (int i = 0; i < Vector<T>::kSize; ++i) out[part + i] = v[i];
    }
  } else {
    static_assert(kSize == 1, "lanes side by side take elements side by side");
    out[0] = to_float(row[first]);
  }
}

// One block: kShrinkRanks ranks of one adapter for kShrinkRows rows. All its lanes and warps divide the input, so that
// no sum passes through global memory; the order of additions is fixed. Grid: [adapter x ranks, rows].
// T: of x, AdapterT: of A. kAligned: rows of x and A begin on 16 bytes and hold whole vectors.
template <typename T, typename AdapterT, bool kAligned>
__global__ void __launch_bounds__(32 * kLoraWarps) lora_shrink_kernel(LoraDecode d, int64_t tiles) {
  constexpr int kVector = kAligned ? Vector<T>::kSize : 1;
  constexpr int kSums = kShrinkRanks * kShrinkRows;
  static_assert(kSums == 32, "the transposing sum below leaves one sum in each lane");
  let_next_kernel_begin();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  // Counters of the second kernel, which waits for this one before it uses them.
  const int64_t block = blockIdx.x + static_cast<int64_t>(gridDim.x) * blockIdx.y;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * gridDim.y * blockDim.x;
  for (int64_t i = block * blockDim.x + thread; i < tiles; i += threads) d.arrivals[i] = 0;

  const int rank_tiles = (d.rank + kShrinkRanks - 1) / kShrinkRanks;
  const int adapter = blockIdx.x / rank_tiles;
  const int first_rank = blockIdx.x % rank_tiles * kShrinkRanks;
  const int first_row = blockIdx.y * kShrinkRows;
  bool used = false;
#pragma unroll
  for (int m = 0; m < kShrinkRows; ++m) used |= adapter_of_row(d, first_row + m) == adapter;
  if (!used) return;  // the same in every thread of the block

  float sums[kSums] = {};
  const T* x = static_cast<const T*>(d.x) + first_row * d.x_stride;
  const AdapterT* A = static_cast<const AdapterT*>(d.A) + (static_cast<int64_t>(adapter) * d.rank + first_rank) * d.in;
  for (int64_t k = static_cast<int64_t>(thread) * kVector; k < d.in; k += 32 * kLoraWarps * kVector) {
    float a[kShrinkRanks][kVector] = {};
#pragma unroll
    for (int r = 0; r < kShrinkRanks; ++r) {
      if (first_rank + r < d.rank) load_floats<kAligned, true>(A + r * d.in, k, d.in, a[r]);
    }
#pragma unroll
    for (int m = 0; m < kShrinkRows; ++m) {
      float values[kVector] = {};
      if (first_row + m < d.rows) load_floats<kAligned, false>(x + m * d.x_stride, k, d.in, values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
#pragma unroll
        for (int r = 0; r < kShrinkRanks; ++r) sums[r * kShrinkRows + m] += a[r][i] * values[i];
      }
    }
  }

  // Each exchange halves the sums a lane holds, so that lane i ends with sum i of the warp: 31 shuffles for 32 sums.
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const bool upper = lane & half;
      const float kept = upper ? sums[i + half] : sums[i];
      sums[i] = kept + shuffle_xor(upper ? sums[i] : sums[i + half], half);
    }
  }
  __shared__ float warp_sums[kLoraWarps][kSums];
  warp_sums[warp][lane] = sums[0];
  __syncthreads();
  if (warp != 0) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kLoraWarps; ++w) total += warp_sums[w][lane];
  const int rank = first_rank + lane / kShrinkRows, row = first_row + lane % kShrinkRows;
  if (rank < d.rank && adapter_of_row(d, row) == adapter) {
    d.low_rank[static_cast<int64_t>(row) * d.rank + rank] = d.scaling[adapter] * total;
  }
}

}  // namespace ztok
