// residual_quantize on the CPU.
#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "quantize_kernel.h"
#include "tensors.h"

namespace ztok {
namespace {

constexpr const char* kOp = "residual_quantize";
constexpr int64_t kElementsPerTask = 32 * 1024;  // below this a second thread costs more than the work

}  // namespace

float quantize_rows(const char* op, const Matrix& latents, const Codebooks& codebooks, const LevelCounts& levels,
                    const Quantized& result) {
  const int64_t rows = latents.rows, num_levels = codebooks.levels, size = codebooks.first.rows;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t used = levels.of(row, num_levels);
    ZTOK_CHECK(used >= 0 && used <= num_levels, op, "levels: expected at most ", num_levels, ", got ", used);
  }
  Buffer<double> errors(rows);
  const bool finite = search_codes(latents, codebooks, Metric::l2, levels, {result.codes, nullptr, errors.get()});
  ZTOK_CHECK(finite, op, "codebooks: expected finite values, got NaN or infinity");
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / (latents.width * num_levels));
  torch::stable::parallel_for(0, rows, rows_per_task, [&](int64_t begin, int64_t end) {
    ZTOK_SELECT(sum_codes)(codebooks.first, num_levels, codebooks.level_stride, result.codes, begin, end,
                           result.quantized, result.element);
  });
  std::fill_n(result.usage, num_levels * size, 0);
  int64_t used = 0;
  double error = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t l = 0; l < num_levels; ++l) {
      const int32_t code = result.codes[row * num_levels + l];
      if (code < 0) continue;
      ++result.usage[l * size + code];
      ++used;
    }
    error += errors[row];
  }
  // No square of a finite residual overflows float64: infinity is that of a row.
  if (std::isinf(error)) return std::numeric_limits<float>::quiet_NaN();
  return static_cast<float>(error / static_cast<double>(std::max<int64_t>(used, 1) * latents.width));
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_quantize(const Tensor& latents, const Tensor& codebooks,
                                                                     const std::optional<Tensor>& levels) {
  check_search(kOp, "latents", latents, codebooks);
  ZTOK_CHECK(codebooks.dim() == 3, kOp, "codebooks: expected [L, V, d], got ", codebooks.dim(), " dimensions");
  const Tensor rows = with_adjacent_elements(latents), books = with_adjacent_elements(codebooks);
  const int64_t num_rows = latents.size(0), num_levels = codebooks.size(0);
  Tensor quantized = new_tensor(latents, {num_rows, latents.size(1)});
  Tensor codes = new_tensor(latents, {num_rows, num_levels}, ScalarType::Int);
  Tensor usage = new_tensor(latents, {num_levels, codebooks.size(1)}, ScalarType::Long);
  Tensor commitment = new_tensor(latents, {}, ScalarType::Float);
  Tensor codebook_loss = new_tensor(latents, {}, ScalarType::Float);
  const float loss =
      quantize_rows(kOp, matrix_of(kOp, "latents", rows), codebooks_of(kOp, books), level_counts(kOp, levels, num_rows),
                    {codes.mutable_data_ptr<int32_t>(), quantized.mutable_data_ptr(),
                     element_of(kOp, "latents", latents), usage.mutable_data_ptr<int64_t>()});
  *commitment.mutable_data_ptr<float>() = loss;
  *codebook_loss.mutable_data_ptr<float>() = loss;
  return {quantized, commitment, codebook_loss, codes, usage};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("residual_quantize", TORCH_BOX(&ztok::residual_quantize)); }
