// codebook_assign on the CPU.
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "nearest.h"
#include "tensors.h"

namespace ztok {
namespace {

constexpr const char* kOp = "codebook_assign";

Metric metric_of(int64_t number) {
  ZTOK_CHECK(number >= 0 && number <= 2, kOp, "metric: expected 0 (l2), 1 (cosine) or 2 (dot), got ", number);
  return static_cast<Metric>(number);
}

std::tuple<Tensor, Tensor> codebook_assign(const Tensor& x, const Tensor& codebooks, int64_t metric) {
  ZTOK_CHECK(x.dim() == 2, kOp, "x: expected [M, d], got ", x.dim(), " dimensions");
  ZTOK_CHECK(codebooks.dim() == 3, kOp, "codebooks: expected [L, V, d], got ", codebooks.dim(), " dimensions");
  ZTOK_CHECK(codebooks.size(2) == x.size(1), kOp, "codebooks: expected width ", x.size(1), ", got ", codebooks.size(2));
  ZTOK_CHECK(codebooks.size(0) > 0 && codebooks.size(1) > 0 && codebooks.size(2) > 0, kOp,
             "codebooks: expected at least one level, code and element");
  const Tensor rows = with_adjacent_elements(x), books = with_adjacent_elements(codebooks);
  Tensor distances = torch::stable::new_empty(x, {x.size(0), codebooks.size(0)}, ScalarType::Float);
  Tensor codes = torch::stable::new_empty(x, {x.size(0), codebooks.size(0)}, ScalarType::Int);
  search_codes(matrix_of(kOp, "x", rows), {matrix_of(kOp, "codebooks", books), books.size(0), books.stride(0)},
               metric_of(metric), {}, {codes.mutable_data_ptr<int32_t>(), distances.mutable_data_ptr<float>()});
  return {distances, codes};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) {
  m.def("codebook_assign_native(Tensor x, Tensor codebooks, int metric) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("codebook_assign_native", TORCH_BOX(&ztok::codebook_assign));
}
