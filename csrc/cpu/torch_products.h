// Matrix products by torch, written into a result of a given dtype.
//
// Kernels run while autocast may be on, which would have torch::stable::matmul return bfloat16 for float32 operands. It
// leaves the overloads that write into a result alone.
#pragma once

#include <array>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "new_tensor.h"

namespace ztok {

template <size_t N>
void call_out(const char* name, std::array<StableIValue, N> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);  // takes the reference to the result that comes back
}

// y = a b, all matrices of one dtype.
inline void multiply_into(const torch::stable::Tensor& a, const torch::stable::Tensor& b, torch::stable::Tensor& y) {
  using torch::stable::detail::from;
  call_out<3>("aten::mm", {from(a), from(b), from(y)});
}

inline torch::stable::Tensor multiplied(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  torch::stable::Tensor y = new_tensor(a, {a.size(0), b.size(1)});
  multiply_into(a, b, y);
  return y;
}

}  // namespace ztok
