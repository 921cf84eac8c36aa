// The kernel that pack, unpack and gather share, free of any framework. Its body is two functions of a thread's number,
// which the tests also run on the host, one thread after another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ragged_index.h"

#ifndef __CUDACC__
struct uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
#endif

namespace ztok {

// Rows are copied as bytes, in units of 1, 2, 4, 8 or 16 of them: the widest one that divides every address and stride.
// One block writes one tile of consecutive output units, so that short rows share a block and long ones are shared by
// many, and every thread has kUnitsPerThread independent loads in flight.
constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;
constexpr int kTileUnits = kThreads * kUnitsPerThread;
constexpr int kTileRows = kTileUnits;  // rows of one unit are the worst case

// 16 bytes that repeat from the start of each row: one pattern for every element size.
template <typename Unit>
struct Fill {
  static constexpr int kPeriod = 16 / sizeof(Unit);
  Unit units[kPeriod];

  ZTOK_HD Unit at(uint32_t unit) const { return units[unit % kPeriod]; }
};

// Through the read-only cache; a pointer that comes from shared memory would else be a generic load.
template <typename Unit>
ZTOK_HD Unit load(const Unit* address) {
#ifdef __CUDA_ARCH__
  return __ldg(address);
#else
  return *address;
#endif
}

// What a locator says of an output row besides the address of its source.
template <typename Unit>
ZTOK_HD const Unit* filled() {
  return nullptr;
}
template <typename Unit>
ZTOK_HD const Unit* untouched() {
  return reinterpret_cast<const Unit*>(~static_cast<uintptr_t>(0));
}

struct Tile {
  int64_t first;        // output unit
  int64_t first_row;    // row of that unit
  uint32_t first_unit;  // and its place in the row
  int units;
  int rows;
};

ZTOK_HD int64_t num_tiles(int64_t rows, uint32_t row_units) { return (rows * row_units + kTileUnits - 1) / kTileUnits; }

ZTOK_HD Tile tile_at(int64_t tile, int64_t rows, uint32_t row_units) {
  const int64_t first = tile * kTileUnits, left = rows * row_units - first;
  const int64_t first_row = first / row_units;
  const uint32_t first_unit = static_cast<uint32_t>(first - first_row * row_units);
  const int units = left < kTileUnits ? static_cast<int>(left) : kTileUnits;
  return {first, first_row, first_unit, units, static_cast<int>((first_unit + units - 1) / row_units) + 1};
}

// First half of a tile: where its rows come from.
template <typename Unit, typename Locator>
ZTOK_HD void locate_rows(const Tile& tile, int thread, const Locator& locator, const Unit** sources) {
  for (int row = thread; row < tile.rows; row += kThreads) {
    const bool holds_first_unit = row > 0 || tile.first_unit == 0;
    sources[row] = locator.find(tile.first_row + row, holds_first_unit);
  }
}

// Second half: all loads of a thread, then its stores.
template <typename Unit>
ZTOK_HD void copy_units(const Tile& tile, int thread, const Unit* const* sources, Unit* out, uint32_t row_units,
                        const Fill<Unit>& fill) {
  Unit values[kUnitsPerThread];
  bool written[kUnitsPerThread];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int j = 0; j < kUnitsPerThread; ++j) {
    const int unit = thread + j * kThreads;
    written[j] = unit < tile.units;
    if (!written[j]) continue;
    const uint32_t offset = tile.first_unit + unit;
    const uint32_t row = offset / row_units;
    const uint32_t row_unit = offset - row * row_units;
    const Unit* source = sources[row];
    written[j] = source != untouched<Unit>();
    if (source == filled<Unit>()) {
      values[j] = fill.at(row_unit);
    } else if (written[j]) {
      values[j] = load(source + row_unit);
    }
  }
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int j = 0; j < kUnitsPerThread; ++j) {
    if (written[j]) out[tile.first + thread + j * kThreads] = values[j];
  }
}

// ---- locators: output row -> address of its source. Strides in units.

// packed[cu_seqlens[b] + s] = padded[b, s]; rows past the last sequence, and those that bad offsets leave out, are
// filled.
template <typename Unit>
struct PackRows {
  const Unit* padded;
  Indices cu_seqlens;
  int64_t batch, max_length, batch_stride, row_stride;

  ZTOK_HD const Unit* find(int64_t row, bool) const {
    if (batch == 0 || row >= cu_seqlens[batch]) return filled<Unit>();
    const int64_t sequence = sequence_of([this](int64_t b) { return cu_seqlens[b]; }, batch, row);
    const int64_t position = row - cu_seqlens[sequence];
    const bool covered = position >= 0 && position < max_length && row < cu_seqlens[sequence + 1];
    return covered ? padded + (sequence * batch_stride + position * row_stride) : filled<Unit>();
  }
};

// padded[b, s] = packed[cu_seqlens[b] + s]; `row` counts the rows of padded.
template <typename Unit>
struct UnpackRows {
  const Unit* packed;
  Indices cu_seqlens;
  int64_t total, max_length, row_stride;

  ZTOK_HD const Unit* find(int64_t row, bool) const {
    const int64_t sequence = row / max_length;
    const int64_t source = cu_seqlens[sequence] + (row - sequence * max_length);
    const bool covered = source >= 0 && source < cu_seqlens[sequence + 1] && source < total;
    return covered ? packed + source * row_stride : filled<Unit>();
  }
};

#ifdef __CUDACC__
template <typename Unit, typename Locator>
__global__ void __launch_bounds__(kThreads, 4)
    copy_rows_kernel(const __grid_constant__ Locator locator, Unit* __restrict__ out, int64_t rows, uint32_t row_units,
                     const __grid_constant__ Fill<Unit> fill) {
  __shared__ const Unit* sources[kTileRows];
  const int64_t tiles = num_tiles(rows, row_units);
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const Tile tile = tile_at(i, rows, row_units);
    locate_rows(tile, threadIdx.x, locator, sources);
    __syncthreads();
    copy_units(tile, threadIdx.x, sources, out, row_units, fill);
    __syncthreads();
  }
}
#endif

}  // namespace ztok
