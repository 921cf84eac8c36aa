// What the CPU and CUDA versions of ragged_pack and ragged_unpack share: argument checks that read no tensor values,
// and the byte layout of a padded batch. Rows are copied as bytes, so one kernel serves every dtype.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "check.h"
#include "new_tensor.h"
#include "ragged_index.h"

namespace ztok {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string name_of(ScalarType type) { return torch::headeronly::toString(type); }

// ---- index tensors

inline bool is_wide(const Tensor& indices) { return indices.scalar_type() == ScalarType::Long; }

inline void check_indices(const char* op, const char* argument, const Tensor& indices, const char* layout) {
  ZTOK_CHECK(indices.dim() == 1, op, argument, ": expected ", layout, ", got ", indices.dim(), " dimensions");
  ZTOK_CHECK(is_wide(indices) || indices.scalar_type() == ScalarType::Int, op, argument,
             ": expected dtype int32 or int64, got ", name_of(indices.scalar_type()));
}

// A call of torch only where there is something to copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Of a contiguous tensor.
inline Indices indices_of(const Tensor& indices) { return {indices.const_data_ptr(), is_wide(indices)}; }

// ---- rows

inline int64_t row_bytes_of(const Tensor& tensor, int64_t first_dim) {
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (int64_t d = first_dim; d < tensor.dim(); ++d) bytes *= tensor.size(d);
  return bytes;
}

// Slices and expanded batches are read in place; only rows that are themselves strided are copied first. A row is what
// dimensions `first_dim` and up hold.
inline Tensor with_contiguous_rows(const Tensor& tensor, int64_t first_dim) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= first_dim; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return torch::stable::contiguous(tensor);
    expected *= tensor.size(d);
  }
  return tensor;
}

// padded [batch, max_length, *]; a row is one position's trailing dimensions, contiguous in memory.
struct PaddedLayout {
  int64_t batch;
  int64_t max_length;
  int64_t row_bytes;
  int64_t batch_stride;  // bytes
  int64_t row_stride;    // bytes
};

inline PaddedLayout padded_layout(const Tensor& padded) {
  const int64_t element = static_cast<int64_t>(padded.element_size());
  return {padded.size(0), padded.size(1), row_bytes_of(padded, 2), padded.stride(0) * element,
          padded.stride(1) * element};
}

// ---- checks of pack and unpack

inline void check_offsets_of_batch(const char* op, const Tensor& cu_seqlens, int64_t batch) {
  check_indices(op, "cu_seqlens", cu_seqlens, "[B + 1]");
  ZTOK_CHECK(cu_seqlens.size(0) == batch + 1, op, "cu_seqlens: expected ", batch + 1, " offsets for a batch of ", batch,
             ", got ", cu_seqlens.size(0));
}

inline void check_padded(const char* op, const Tensor& padded) {
  ZTOK_CHECK(padded.dim() >= 2, op, "padded: expected [B, S, *] with at least 2 dimensions, got ", padded.dim());
}

inline void check_packed(const char* op, const Tensor& packed) {
  ZTOK_CHECK(packed.dim() >= 1, op, "packed: expected [T, *] with at least 1 dimension, got 0");
}

// New tensor with leading sizes and the trailing sizes of another.
inline Tensor new_rows(const Tensor& like, std::vector<int64_t> leading, int64_t first_dim) {
  for (int64_t d = first_dim; d < like.dim(); ++d) leading.push_back(like.size(d));
  return new_tensor(like, leading);
}

// ---- fill

// 16 bytes that repeat `value` as an element of the dtype.
struct FillPattern {
  unsigned char bytes[16];

  bool is_uniform() const { return std::memcmp(bytes, bytes + 1, 15) == 0; }

  template <typename T>
  static FillPattern repeat(T value) {
    FillPattern pattern;
    for (size_t i = 0; i < 16; i += sizeof(T)) std::memcpy(pattern.bytes + i, &value, sizeof(T));
    return pattern;
  }
};

inline FillPattern fill_pattern(const char* op, ScalarType type, double value) {
  switch (type) {
    case ScalarType::Bool:
      return FillPattern::repeat<unsigned char>(value != 0);
    case ScalarType::Byte:
      return FillPattern::repeat(static_cast<uint8_t>(value));
    case ScalarType::Char:
      return FillPattern::repeat(static_cast<int8_t>(value));
    case ScalarType::Short:
      return FillPattern::repeat(static_cast<int16_t>(value));
    case ScalarType::Int:
      return FillPattern::repeat(static_cast<int32_t>(value));
    case ScalarType::Long:
      return FillPattern::repeat(static_cast<int64_t>(value));
    case ScalarType::Half:
      return FillPattern::repeat(c10::Half(static_cast<float>(value)));
    case ScalarType::BFloat16:
      return FillPattern::repeat(c10::BFloat16(static_cast<float>(value)));
    case ScalarType::Float:
      return FillPattern::repeat(static_cast<float>(value));
    case ScalarType::Double:
      return FillPattern::repeat(value);
    default:
      fail(op, "packed: expected a real or bool dtype, got ", name_of(type));
  }
}

}  // namespace ztok
