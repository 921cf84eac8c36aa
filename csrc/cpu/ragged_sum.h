// Sums of rows by index, in a fixed order and the same bits whatever the number of threads.
#pragma once

#include "ragged.h"

namespace ztok {

struct RowPairs {
  Indices index;        // of the result's row that a row is added to
  const int64_t* rows;  // which row that is; null: the k-th
  int64_t count;
};

// sums [R, D], contiguous: row r becomes the sum, in order of k, of the rows with index[k] == r; zero without any.
// `rows` [T, D] has contiguous rows of a floating-point dtype. Accumulates in fp32, for float64 in float64.
void sum_rows_by_index(const char* op, const Tensor& rows, const RowPairs& pairs, Tensor& sums);

}  // namespace ztok
