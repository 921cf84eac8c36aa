// codebook_assign on the CPU.
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "nearest.h"
#include "tensors.h"

namespace ztok {
namespace {

constexpr const char* kOp = "codebook_assign";

std::tuple<Tensor, Tensor> codebook_assign(const Tensor& x, const Tensor& codebooks, const std::string& metric) {
  check_search(kOp, "x", x, codebooks);
  const Tensor rows = with_adjacent_elements(x), books = with_adjacent_elements(codebooks);
  const bool levels = codebooks.dim() == 3;
  const int64_t sizes[] = {x.size(0), levels ? codebooks.size(0) : 1};
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes, levels ? 2 : 1);
  Tensor distances = new_tensor(x, shape, ScalarType::Float);
  Tensor codes = new_tensor(x, shape, ScalarType::Int);
  const bool finite = search_codes(matrix_of(kOp, "x", rows), codebooks_of(kOp, books), metric_of(kOp, metric), {},
                                   {codes.mutable_data_ptr<int32_t>(), distances.mutable_data_ptr<float>()});
  ZTOK_CHECK(finite, kOp, "codebooks: expected finite values, got NaN or infinity");
  return {distances, codes};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("codebook_assign", TORCH_BOX(&ztok::codebook_assign)); }
