// Launching copy_rows_kernel.
#pragma once

#include <cstring>
#include <limits>

#include "check.h"
#include "launch.h"
#include "ragged_kernel.cuh"
#include "stream.h"

namespace ztok {

// Writes out[0, rows) from where the locator says. `fill` is 16 bytes, null for zeros.
template <typename Unit, typename Locator>
void copy_rows(const char* op, const Locator& locator, void* out, int64_t rows, int64_t row_bytes, const void* fill,
               cudaStream_t stream) {
  const int64_t row_units = row_bytes / static_cast<int64_t>(sizeof(Unit));
  if (rows == 0 || row_units == 0) return;
  // Offsets inside a tile are 32 bits wide.
  ZTOK_CHECK(row_units <= std::numeric_limits<int32_t>::max(), op, "expected rows of less than 2^31 units of ",
             sizeof(Unit), " bytes, got ", row_units);
  Fill<Unit> pattern{};
  if (fill) std::memcpy(&pattern, fill, sizeof(pattern));
  const unsigned blocks = blocks_for(num_tiles(rows, static_cast<uint32_t>(row_units)), 1);
  copy_rows_kernel<Unit, Locator><<<blocks, kThreads, 0, stream>>>(locator, static_cast<Unit*>(out), rows,
                                                                   static_cast<uint32_t>(row_units), pattern);
  check_launch(op);
}

}  // namespace ztok
