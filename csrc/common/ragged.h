// What the CPU and CUDA versions of the ragged ops share: argument checks that read no tensor values, and the
// byte layout of a padded batch. Rows are copied as bytes, so one kernel serves every dtype.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check.h"

namespace ztok {

using torch::stable::Tensor;

// padded [batch, max_length, *]; a row is one position's trailing dimensions, contiguous in memory.
struct PaddedLayout {
  int64_t batch;
  int64_t max_length;
  int64_t row_bytes;
  int64_t batch_stride;  // bytes
  int64_t row_stride;    // bytes
};

// Slices and expanded batches are read in place; only rows that are themselves strided are copied first.
inline Tensor with_contiguous_rows(const Tensor& padded) {
  int64_t expected = 1;
  for (int64_t d = padded.dim() - 1; d >= 2; --d) {
    if (padded.size(d) != 1 && padded.stride(d) != expected) return torch::stable::contiguous(padded);
    expected *= padded.size(d);
  }
  return padded;
}

inline PaddedLayout padded_layout(const Tensor& padded) {
  const int64_t element = static_cast<int64_t>(padded.element_size());
  int64_t row_elements = 1;
  for (int64_t d = 2; d < padded.dim(); ++d) row_elements *= padded.size(d);
  return {padded.size(0), padded.size(1), row_elements * element, padded.stride(0) * element,
          padded.stride(1) * element};
}

inline bool has_int64_offsets(const Tensor& cu_seqlens) {
  return cu_seqlens.scalar_type() == torch::headeronly::ScalarType::Long;
}

inline void check_padded_and_offsets(const char* op, const Tensor& padded, const Tensor& cu_seqlens) {
  using torch::headeronly::ScalarType;
  ZTOK_CHECK(padded.dim() >= 2, op, "padded: expected [B, S, *] with at least 2 dimensions, got ", padded.dim());
  ZTOK_CHECK(cu_seqlens.dim() == 1, op, "cu_seqlens: expected [B + 1], got ", cu_seqlens.dim(), " dimensions");
  ZTOK_CHECK(cu_seqlens.scalar_type() == ScalarType::Int || cu_seqlens.scalar_type() == ScalarType::Long, op,
             "cu_seqlens: expected dtype int32 or int64, got ", torch::headeronly::toString(cu_seqlens.scalar_type()));
  ZTOK_CHECK(cu_seqlens.size(0) == padded.size(0) + 1, op, "cu_seqlens: expected ", padded.size(0) + 1,
             " offsets for a batch of ", padded.size(0), ", got ", cu_seqlens.size(0));
}

// packed [total, *] with padded's trailing sizes and dtype, contiguous.
inline void check_packed(const char* op, const Tensor& padded, const Tensor& packed) {
  ZTOK_CHECK(packed.dim() == padded.dim() - 1, op, "packed: expected ", padded.dim() - 1, " dimensions, got ",
             packed.dim());
  for (int64_t d = 1; d < packed.dim(); ++d) {
    ZTOK_CHECK(packed.size(d) == padded.size(d + 1), op, "packed: expected size ", padded.size(d + 1),
               " in dimension ", d, ", got ", packed.size(d));
  }
  ZTOK_CHECK(packed.scalar_type() == padded.scalar_type(), op, "packed: expected the dtype of padded, ",
             torch::headeronly::toString(padded.scalar_type()), ", got ",
             torch::headeronly::toString(packed.scalar_type()));
  ZTOK_CHECK(packed.is_contiguous(), op, "packed: expected a contiguous tensor");
}

inline Tensor new_packed(const char* op, const Tensor& padded, int64_t total) {
  ZTOK_CHECK(total >= 0, op, "total: expected the number of packed rows, at least 0, got ", total);
  ZTOK_CHECK(padded.dim() >= 2, op, "padded: expected [B, S, *] with at least 2 dimensions, got ", padded.dim());
  std::vector<int64_t> shape{total};
  for (int64_t d = 2; d < padded.dim(); ++d) shape.push_back(padded.size(d));
  return torch::stable::new_empty(padded, shape);
}

}  // namespace ztok
