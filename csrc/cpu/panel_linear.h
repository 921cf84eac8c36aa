// What linear layers whose weights lie in panels check alike: int8_linear and ordered_linear.
#pragma once

#include <optional>

#include "int8_products.h"
#include "tensors.h"

namespace ztok {

// The bias of a layer of so many outputs, without gaps, or none. `padded` columns are in the panels.
inline std::optional<Tensor> bias_of(const char* op, const std::optional<Tensor>& bias, int64_t out_features,
                                     int64_t padded) {
  ZTOK_CHECK(out_features <= padded && out_features > padded - kPanelColumns, op, "out_features: expected at most ",
             padded, " and more than ", padded - kPanelColumns, ", got ", out_features);
  if (!bias.has_value()) return {};
  ZTOK_CHECK(bias->dim() == 1 && bias->size(0) == out_features && bias->scalar_type() == ScalarType::Float, op,
             "bias: expected float32 [", out_features, "]");
  return torch::stable::contiguous(*bias);
}

}  // namespace ztok
