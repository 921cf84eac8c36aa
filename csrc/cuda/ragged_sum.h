// Sums of rows by index on CUDA, in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "ragged.h"

namespace ztok {

// Which rows are summed: those of one source of a gather, found in the gathered batch through `layout`, or rows in
// their own order (`layout` null).
struct RowPairs {
  Indices index;  // of the result's row that a row is added to
  int64_t count;
  const Interleave* layout;
  int source;
};

// sums [R, D], contiguous: row r becomes the sum, in order of k, of the rows with index[k] == r; zero without any.
// `rows` [T, D] has contiguous rows of a floating-point dtype. Accumulates in fp32, for float64 in float64. Rows with
// an index outside of [0, R) and rows in no sequence are left out. Scratch memory of O(T + T D / 16) values.
void sum_rows_by_index(const char* op, const Tensor& rows, const RowPairs& pairs, Tensor& sums, cudaStream_t stream);

}  // namespace ztok
