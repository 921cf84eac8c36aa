// ragged_scatter_add on the CPU: rows are sorted by index with a counting sort, then every row of the result is summed
// by one thread (or by a few, each its own columns), in order.
#include "ragged_sum.h"

#include <algorithm>
#include <memory>

#include <torch/csrc/stable/library.h>

#include "ragged_copy.h"
#include "ragged_sum_kernel.h"

namespace ztok {
namespace {

constexpr const char* kOp = "ragged_scatter_add";
constexpr int64_t kBytesPerPart = 128 * 1024;

SumType sum_type(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return SumType::kFloat;
    case ScalarType::Double:
      return SumType::kDouble;
    case ScalarType::Half:
      return SumType::kHalf;
    case ScalarType::BFloat16:
      return SumType::kBFloat16;
    default:
      fail(op, "rows: expected a floating-point dtype, got ", name_of(type));
  }
}

// Rows that are added to result row r are order[starts[r]] to order[starts[r + 1]], in their order.
struct SortedRows {
  std::vector<int64_t> starts;
  std::unique_ptr<int64_t[]> order;
};

SortedRows sort_rows(const char* op, const RowPairs& pairs, int64_t num_rows, int64_t rows_there) {
  SortedRows sorted{std::vector<int64_t>(num_rows + 1, 0), std::unique_ptr<int64_t[]>(new int64_t[pairs.count])};
  for (int64_t k = 0; k < pairs.count; ++k) {
    const int64_t index = pairs.index[k];
    ZTOK_CHECK(index >= 0 && index < num_rows, op, "index: expected values in [0, ", num_rows, "), got ", index);
    ++sorted.starts[index];
  }
  // Counts become ends; walking the pairs backwards turns the ends into starts.
  int64_t end = 0;
  for (int64_t& count : sorted.starts) count = end += count;
  for (int64_t k = pairs.count; k-- > 0;) {
    const int64_t row = pairs.rows ? pairs.rows[k] : k;
    ZTOK_CHECK(row >= 0 && row < rows_there, op, "rows: expected fewer than ", row + 1);
    sorted.order[--sorted.starts[pairs.index[k]]] = row;
  }
  return sorted;
}

}  // namespace

void sum_rows_by_index(const char* op, const Tensor& rows, const RowPairs& pairs, Tensor& sums) {
  const SumType type = sum_type(op, rows.scalar_type());
  const int64_t num_rows = sums.size(0), width = sums.size(1), element = static_cast<int64_t>(sums.element_size());
  const int64_t row_bytes = width * element;
  const SortedRows sorted = sort_rows(op, pairs, num_rows, rows.size(0));
  if (num_rows == 0 || row_bytes == 0) return;
  const void* source = rows.const_data_ptr();
  const int64_t stride = rows.stride(0);
  auto* target = static_cast<char*>(sums.mutable_data_ptr());
  const auto sum_row = ZTOK_SELECT(ragged_sum_rows);

  // Threads share the result by rows, weighed by what is added to them and one for writing them. Where rows of the
  // result are few, one of them may be most of the work, so that columns are shared as well.
  const int64_t column_parts = pairs.count >= num_rows ? std::clamp<int64_t>(row_bytes / 512, 1, 4) : 1;
  const int64_t weight = pairs.count + num_rows;
  const int64_t row_parts = std::clamp<int64_t>(weight * row_bytes / kBytesPerPart, 1, 64);
  const auto first_row = [&](int64_t part) {
    const int64_t wanted = weight * part / row_parts;
    int64_t low = 0, high = num_rows;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (sorted.starts[middle] + middle < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  torch::stable::parallel_for(0, column_parts * row_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t columns = part / row_parts, row_part = part % row_parts;
      const int64_t from = width * columns / column_parts, to = width * (columns + 1) / column_parts;
      const int64_t last = first_row(row_part + 1);
      for (int64_t row = first_row(row_part); row < last;) {
        const int64_t start = sorted.starts[row], count = sorted.starts[row + 1] - start;
        char* out = target + row * row_bytes;
        if (count > 0) {
          sum_row(type, source, stride, sorted.order.get() + start, count, from, to, out);
          ++row;
          continue;
        }
        int64_t stop = row + 1;
        if (column_parts == 1) {
          while (stop < last && sorted.starts[stop + 1] == start) ++stop;
        }
        std::memset(out + from * element, 0, (stop - row - 1) * row_bytes + (to - from) * element);
        row = stop;
      }
    }
  });
}

namespace {

Tensor ragged_scatter_add(const Tensor& rows, const Tensor& index, int64_t num_rows) {
  ZTOK_CHECK(rows.dim() == 2 && num_rows >= 0, kOp, "expected rows [T, D] and num_rows of at least 0");
  check_indices(kOp, "index", index, "[T]");
  ZTOK_CHECK(index.size(0) == rows.size(0), kOp, "index: expected ", rows.size(0), " values, got ", index.size(0));
  ZTOK_CHECK(rows.is_cpu() && index.is_cpu(), kOp, "expected CPU tensors");
  Tensor sums = with_huge_pages(new_rows(rows, {num_rows}, 1));
  const Tensor contiguous = as_contiguous(index);
  sum_rows_by_index(kOp, with_contiguous_rows(rows, 1), {indices_of(contiguous), nullptr, index.size(0)}, sums);
  return sums;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("ragged_scatter_add", TORCH_BOX(&ztok::ragged_scatter_add)); }
