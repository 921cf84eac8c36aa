// The kernel of ragged_pack, free of any framework so that it can be compiled and inspected alone.
#pragma once

#include <cstdint>

namespace ztok {

// packed[t] = padded[b, t - cu_seqlens[b]], b the sequence that holds row t. One group of threads (blockDim.x) per
// packed row, so that work grows with the rows there are and not with the padded length. Rows that the offsets do not
// cover (offsets cannot be checked without a synchronisation) are zero, and nothing outside the tensors is touched.
// Strides and row length in units of Unit.
template <typename Unit, typename Offset>
__global__ void ragged_pack_kernel(const Unit* __restrict__ padded, const Offset* __restrict__ cu_seqlens,
                                   Unit* __restrict__ packed, int64_t batch, int64_t max_length, int64_t row_units,
                                   int64_t batch_stride, int64_t row_stride, int64_t total) {
  const int64_t rows_per_grid = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < total; row += rows_per_grid) {
    // Last sequence that begins at or before the row; the searched range stays inside [0, batch).
    int64_t low = 0, high = batch;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (static_cast<int64_t>(cu_seqlens[middle]) <= row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    bool covered = batch > 0;
    int64_t position = 0;
    if (covered) {
      position = row - static_cast<int64_t>(cu_seqlens[low]);
      covered = position >= 0 && position < max_length && row < static_cast<int64_t>(cu_seqlens[low + 1]);
    }
    const Unit* source = padded + (covered ? low * batch_stride + position * row_stride : 0);
    Unit* target = packed + row * row_units;
    for (int64_t unit = threadIdx.x; unit < row_units; unit += blockDim.x) {
      target[unit] = covered ? source[unit] : Unit{};
    }
  }
}

}  // namespace ztok
