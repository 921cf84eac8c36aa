// Result tensors.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace ztok {

// A contiguous tensor with unspecified values on the device of `like`, of its dtype unless another is given. Calls the
// allocator directly: torch::stable::new_empty looks its operator up by name at every call.
inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like,
                                        torch::headeronly::IntHeaderOnlyArrayRef sizes,
                                        std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  int32_t type = 0, device_type = 0, device_index = 0;
  if (dtype.has_value()) {
    type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  constexpr size_t kMostDims = 8;
  int64_t few[kMostDims];
  std::vector<int64_t> many(sizes.size() > kMostDims ? sizes.size() : 0);
  int64_t* strides = many.empty() ? few : many.data();
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= sizes[dim] > 0 ? sizes[dim] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides,
                                                         type, device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace ztok
