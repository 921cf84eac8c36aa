// From stable-ABI tensors to what the kernels take.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "nearest.h"
#include "new_tensor.h"

namespace ztok {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Element element_of(const char* op, const char* argument, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Half:
      return Element::float16;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    default:
      fail(op, argument, ": expected float32, float16 or bfloat16, got ",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

inline Tensor as_float(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
}

inline Metric metric_of(const char* op, const std::string& name) {
  if (name == "l2") return Metric::l2;
  if (name == "cosine") return Metric::cosine;
  ZTOK_CHECK(name == "dot", op, "metric: expected l2, cosine or dot, got ", name);
  return Metric::dot;
}

// Rows are read in place, whatever lies between them; elements that are themselves strided are copied first.
inline Tensor with_adjacent_elements(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The last two dimensions of a tensor whose elements are adjacent, at index 0 of the others.
inline Matrix matrix_of(const char* op, const char* argument, const Tensor& tensor) {
  const int64_t rows = tensor.dim() - 2;
  return {tensor.const_data_ptr(), element_of(op, argument, tensor), tensor.size(rows), tensor.size(rows + 1),
          tensor.stride(rows)};
}

// What every search asks of its rows [M, d] and codebooks [V, d] or [L, V, d].
inline void check_search(const char* op, const char* argument, const Tensor& rows, const Tensor& codebooks) {
  ZTOK_CHECK(rows.dim() == 2, op, argument, ": expected [M, d], got ", rows.dim(), " dimensions");
  const int64_t dims = codebooks.dim();
  ZTOK_CHECK(dims == 2 || dims == 3, op, "codebooks: expected [V, d] or [L, V, d], got ", dims, " dimensions");
  ZTOK_CHECK(codebooks.size(dims - 1) == rows.size(1), op, "codebooks: expected width ", rows.size(1), ", got ",
             codebooks.size(dims - 1));
  ZTOK_CHECK(codebooks.numel() > 0, op, "codebooks: expected at least one level, code and element");
}

inline Codebooks codebooks_of(const char* op, const Tensor& codebooks) {
  const bool levels = codebooks.dim() == 3;
  return {matrix_of(op, "codebooks", codebooks), levels ? codebooks.size(0) : 1, levels ? codebooks.stride(0) : 0};
}

// Levels per row; the values are the caller's to check. int32 or int64 [expected], or none.
inline LevelCounts level_counts(const char* op, const std::optional<Tensor>& levels, int64_t expected) {
  if (!levels.has_value()) return {};
  const ScalarType type = levels->scalar_type();
  ZTOK_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, "levels: expected int32 or int64, got ",
             torch::headeronly::toString(type));
  ZTOK_CHECK(levels->dim() == 1 && levels->size(0) == expected && levels->is_contiguous(), op,
             "levels: expected a contiguous tensor [", expected, "]");
  return {levels->const_data_ptr(), type == ScalarType::Long};
}

}  // namespace ztok
