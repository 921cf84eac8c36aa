// From stable-ABI tensors to what the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "score_layout.h"

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

}  // namespace ztok
