// Argument checks that the CPU and CUDA versions of the ragged gather share, and its sources as plain data.
#pragma once

#include <algorithm>
#include <optional>

#include "ragged.h"

namespace ztok {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

inline void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& main) {
  const bool same = main.is_cuda() ? tensor.is_cuda() && tensor.get_device_index() == main.get_device_index()
                                   : tensor.is_cpu() && main.is_cpu();
  ZTOK_CHECK(same, op, argument, ": expected a tensor on the device of the first one");
}

// Contiguous copies of the offsets of all sources, checked but for their values.
inline Tensors checked_offsets(const char* op, const Tensors& cu_seqlens, size_t num_sources, const Tensor& main) {
  ZTOK_CHECK(num_sources > 0, op, "expected at least one source, got none");
  ZTOK_CHECK(cu_seqlens.size() == num_sources, op, "cu_seqlens: expected ", num_sources,
             " tensors (one per source), got ", cu_seqlens.size());
  Tensors offsets;
  for (const Tensor& cu : cu_seqlens) {
    check_offsets_of_batch(op, cu, cu_seqlens[0].size(0) - 1);
    check_device(op, "cu_seqlens", cu, main);
    offsets.push_back(as_contiguous(cu));
  }
  ZTOK_CHECK(offsets[0].size(0) >= 1, op, "cu_seqlens: expected at least one offset, got none");
  return offsets;
}

inline OptionalTensors checked_row_indices(const char* op, const OptionalTensors& indices, size_t num_sources,
                                           const Tensor& main) {
  ZTOK_CHECK(indices.size() == num_sources, op, "indices: expected ", num_sources,
             " tensors or None (one per source), got ", indices.size());
  OptionalTensors contiguous;
  for (const auto& index : indices) {
    if (!index) {
      contiguous.push_back(std::nullopt);
      continue;
    }
    check_indices(op, "indices", *index, "[T]");
    check_device(op, "indices", *index, main);
    contiguous.push_back(as_contiguous(*index));
  }
  return contiguous;
}

// Tables [R, D] of one dtype and width, with contiguous rows.
inline Tensors checked_tables(const char* op, const Tensors& tables) {
  ZTOK_CHECK(!tables.empty(), op, "tables: expected at least one, got none");
  Tensors rows;
  for (const Tensor& table : tables) {
    ZTOK_CHECK(table.dim() == 2, op, "tables: expected [R, D], got ", table.dim(), " dimensions");
    ZTOK_CHECK(table.size(1) == tables[0].size(1), op, "tables: expected a width of ", tables[0].size(1), ", got ",
               table.size(1));
    ZTOK_CHECK(table.scalar_type() == tables[0].scalar_type(), op, "tables: expected the dtype of the first one, ",
               name_of(tables[0].scalar_type()), ", got ", name_of(table.scalar_type()));
    check_device(op, "tables", table, tables[0]);
    rows.push_back(with_contiguous_rows(table, 1));
  }
  return rows;
}

// Rows that each source has room for.
inline std::vector<int64_t> source_totals(const std::vector<int64_t>& table_rows, const OptionalTensors& indices) {
  std::vector<int64_t> totals;
  for (size_t i = 0; i < indices.size(); ++i) totals.push_back(indices[i] ? indices[i]->size(0) : table_rows[i]);
  return totals;
}

inline int64_t sum_of(const std::vector<int64_t>& values) {
  int64_t sum = 0;
  for (const int64_t value : values) sum += value;
  return sum;
}

inline void check_totals(const char* op, const std::vector<int64_t>& totals) {
  for (const int64_t total : totals) ZTOK_CHECK(total >= 0, op, "totals: expected at least 0, got ", total);
}

}  // namespace ztok
