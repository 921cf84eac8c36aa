// quantize_ragged on the CPU: a block of units at a time is gathered, projected and normalised, then all of them are
// searched. Only rows that have a share in a unit are read. Extra memory: 8 D bytes for each of at most 512 units, 24
// bytes per unit. Backward: what the units are made from is gathered again; four matrix products of K units; one pass
// over the rows.
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "code_gradients.h"
#include "quantize.h"
#include "tensors.h"
#include "torch_products.h"
#include "units.h"

namespace ztok {
namespace {

constexpr const char* kOp = "quantize_ragged";
// added to the mean square of a latent before it is normalised, as in the reference
constexpr float kRmsEps = 1e-6f;
// units that are gathered and projected at a time: their rows stay in the cache between the two
constexpr int64_t kUnitsPerBlock = 512;
constexpr int64_t kBytesPerTask = 64 * 1024;

// The rows of every unit that exists and fits.
std::vector<UnitRows> rows_of_units(const UnitTable& table) {
  const int64_t units = std::clamp<int64_t>(table.cu_units[table.sequences], 0, table.capacity);
  std::vector<UnitRows> rows(units, UnitRows{0, 0, false});
  for_row_ranges(table.rows, 16, [&](int64_t begin, int64_t end) {
    for_each_unit(table, begin, end, [&](int64_t k, const UnitRows& unit) {
      if (k < units) rows[k] = unit;
    });
  });
  return rows;
}

// float [count, D] each: the rows that end `count` units, and the weighted means of the units.
void gather(const Tensor& hidden, const float* weights, const UnitRows* units, int64_t count, float* end_rows,
            float* means) {
  const int64_t width = hidden.size(1), row_bytes = width * static_cast<int64_t>(hidden.element_size());
  const UnitMean mean = unit_mean_kernel(kOp, hidden.scalar_type(), ScalarType::Float);
  const auto* rows = static_cast<const char*>(hidden.const_data_ptr());
  // a row by itself is its own mean: so one is converted to float
  const float whole[2] = {1.0f, 0.0f};
  const int64_t units_per_task = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, 2 * row_bytes));
  torch::stable::parallel_for(0, count, units_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (units[k].end == 0) {  // not a unit that halting_units made
        std::fill_n(end_rows + k * width, width, 0.0f);
        std::fill_n(means + k * width, width, 0.0f);
        continue;
      }
      mean(rows + (units[k].end - 1) * row_bytes, width, whole, UnitRows{0, 1, false}, end_rows + k * width);
      mean(rows, width, weights, units[k], means + k * width);
    }
  });
}

// latents = both projections' sum, divided by its root mean square; scale: what each row was multiplied by.
void normalise(const Tensor& from_ends, const Tensor& from_means, int64_t count, float* latents, float* scale) {
  const int64_t width = from_ends.size(1);
  const auto* a = static_cast<const float*>(from_ends.const_data_ptr());
  const auto* b = static_cast<const float*>(from_means.const_data_ptr());
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16 * 1024 / width), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      float* row = latents + k * width;
      double square = 0;
      for (int64_t i = 0; i < width; ++i) {
        row[i] = a[k * width + i] + b[k * width + i];
        square += static_cast<double>(row[i]) * row[i];
      }
      scale[k] = 1.0f / std::sqrt(static_cast<float>(square / width) + kRmsEps);
      for (int64_t i = 0; i < width; ++i) row[i] *= scale[k];
    }
  });
}

Tensor levels_of_units(const std::optional<Tensor>& levels, const UnitTable& table, int64_t units, int64_t most,
                       const Tensor& like) {
  Tensor out = new_tensor(like, {units}, ScalarType::Int);
  auto* values = static_cast<int32_t*>(out.mutable_data_ptr());
  const LevelCounts counts = level_counts(kOp, levels, table.sequences);
  for (int64_t s = 0; s < table.sequences; ++s) {
    const int64_t end = std::min<int64_t>(table.cu_units[s + 1], units), level = counts.of(s, 0);
    ZTOK_CHECK(level >= 0 && level <= most, kOp, "levels: expected at most ", most, ", got ", level);
    for (int64_t k = table.cu_units[s]; k < end; ++k) values[k] = static_cast<int32_t>(level);
  }
  return out;
}

template <typename T>
void fill_rows(Tensor& tensor, int64_t from, T value) {
  const int64_t width = tensor.dim() == 1 ? 1 : tensor.size(1);
  auto* data = static_cast<T*>(tensor.mutable_data_ptr());
  std::fill(data + from * width, data + tensor.size(0) * width, value);
}

struct Projections {
  Tensor end, mean;  // float [d, D]
};

Projections projections_of(const char* op, const UnitTensors& in, const Tensor& end_weight, const Tensor& mean_weight,
                           const Tensor& codebooks) {
  ZTOK_CHECK(codebooks.dim() == 3 && codebooks.size(0) * codebooks.size(1) > 0, op,
             "codebooks: expected [L, V, d], not empty");
  ZTOK_CHECK(in.weights.scalar_type() == ScalarType::Float, op, "weights: expected float32");
  for (const Tensor* weight : {&end_weight, &mean_weight}) {
    ZTOK_CHECK(weight->dim() == 2 && weight->size(0) == codebooks.size(2) && weight->size(1) == in.rows.size(1), op,
               "end_weight, mean_weight: expected [d, D]");
  }
  return {as_float(end_weight), as_float(mean_weight)};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The ends of units follow from `unit`.
Outputs quantize_ragged(const Tensor& hidden, const Tensor& weights, const Tensor& unit, const Tensor& /*ends*/,
                        const Tensor& cu_units, const Tensor& end_weight, const Tensor& mean_weight,
                        const Tensor& codebooks, const std::optional<Tensor>& levels, int64_t total_units) {
  const UnitTensors in = unit_tensors(kOp, hidden, weights, unit, cu_units);
  const Projections projections = projections_of(kOp, in, end_weight, mean_weight, codebooks);
  check_total_units(kOp, in, total_units);
  const int64_t width = codebooks.size(2), num_levels = codebooks.size(0), hidden_width = hidden.size(1);
  const UnitTable table = in.table(total_units);
  const std::vector<UnitRows> unit_rows = rows_of_units(table);
  const auto units = static_cast<int64_t>(unit_rows.size());

  Tensor latents = new_tensor(hidden, {total_units, width}, ScalarType::Float);
  Tensor scale = new_tensor(hidden, {total_units}, ScalarType::Float);
  const Tensor from_end = torch::stable::transpose(projections.end, 0, 1);
  const Tensor from_mean = torch::stable::transpose(projections.mean, 0, 1);
  const auto* shares = static_cast<const float*>(in.weights.const_data_ptr());
  for (int64_t first = 0; first < units; first += kUnitsPerBlock) {
    const int64_t count = std::min(kUnitsPerBlock, units - first);
    Tensor end_rows = new_tensor(hidden, {count, hidden_width}, ScalarType::Float);
    Tensor means = new_tensor(hidden, {count, hidden_width}, ScalarType::Float);
    gather(in.rows, shares, unit_rows.data() + first, count, static_cast<float*>(end_rows.mutable_data_ptr()),
           static_cast<float*>(means.mutable_data_ptr()));
    normalise(multiplied(end_rows, from_end), multiplied(means, from_mean), count,
              static_cast<float*>(latents.mutable_data_ptr()) + first * width,
              static_cast<float*>(scale.mutable_data_ptr()) + first);
  }
  fill_rows(latents, units, 0.0f);
  fill_rows(scale, units, 1.0f / std::sqrt(kRmsEps));

  Tensor codes = new_tensor(hidden, {total_units, num_levels}, ScalarType::Int);
  Tensor quantized = new_tensor(hidden, {total_units, width}, ScalarType::Float);
  Tensor usage = new_tensor(hidden, {num_levels, codebooks.size(1)}, ScalarType::Long);
  std::optional<Tensor> unit_levels;
  if (levels.has_value()) unit_levels = levels_of_units(as_contiguous(*levels), table, units, num_levels, hidden);
  const Matrix rows{latents.const_data_ptr(), Element::float32, units, width, width};
  const Tensor books = with_adjacent_elements(codebooks);
  const float loss = quantize_rows(kOp, rows, codebooks_of(kOp, books), level_counts(kOp, unit_levels, units),
                                   {static_cast<int32_t*>(codes.mutable_data_ptr()), quantized.mutable_data_ptr(),
                                    Element::float32, static_cast<int64_t*>(usage.mutable_data_ptr())});
  fill_rows(codes, units, int32_t(-1));
  fill_rows(quantized, units, 0.0f);
  Tensor commitment = new_tensor(hidden, {}, ScalarType::Float);
  Tensor codebook_loss = new_tensor(hidden, {}, ScalarType::Float);
  *static_cast<float*>(commitment.mutable_data_ptr()) = loss;
  *static_cast<float*>(codebook_loss.mutable_data_ptr()) = loss;
  return {quantized, latents, commitment, codebook_loss, scale, codes, usage};
}

// Gradient of what was normalised to `latents` z = s r with s = (|r|^2 / d + eps)^(-1/2): s (g - z <g, z> / d), with g
// the sum of both gradients of z.
Tensor unnormalise(const Tensor& latents, const Tensor& scale, const Tensor& grad_latents, const Tensor& from_codes) {
  const int64_t count = latents.size(0), width = latents.size(1);
  Tensor result = new_tensor(latents, {count, width}, ScalarType::Float);
  const auto* z = static_cast<const float*>(latents.const_data_ptr());
  const auto* s = static_cast<const float*>(scale.const_data_ptr());
  const auto* a = static_cast<const float*>(grad_latents.const_data_ptr());
  const auto* b = static_cast<const float*>(from_codes.const_data_ptr());
  auto* out = static_cast<float*>(result.mutable_data_ptr());
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 16 * 1024 / width), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      double product = 0;
      for (int64_t i = k * width; i < (k + 1) * width; ++i) {
        out[i] = a[i] + b[i];
        product += static_cast<double>(out[i]) * z[i];
      }
      const auto mean = static_cast<float>(product / static_cast<double>(width));
      for (int64_t i = k * width; i < (k + 1) * width; ++i) out[i] = s[k] * (out[i] - z[i] * mean);
    }
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_ragged_backward(
    const Tensor& hidden, const Tensor& weights, const Tensor& unit, const Tensor& /*ends*/, const Tensor& cu_units,
    const Tensor& end_weight, const Tensor& mean_weight, const Tensor& codebooks, const Tensor& given_latents,
    const Tensor& scale, const Tensor& codes, const Tensor& grad_quantized, const Tensor& grad_latents,
    const Tensor& grad_commitment, const Tensor& grad_codebook_loss) {
  constexpr const char* op = "quantize_ragged_backward";
  const UnitTensors in = unit_tensors(op, hidden, weights, unit, cu_units);
  const Projections projections = projections_of(op, in, end_weight, mean_weight, codebooks);
  const Tensor latents = as_dtype(given_latents, ScalarType::Float);
  ZTOK_CHECK(latents.dim() == 2 && latents.size(1) == codebooks.size(2) && scale.numel() == latents.size(0) &&
                 grad_latents.dim() == 2 && grad_latents.size(0) == latents.size(0) &&
                 grad_latents.size(1) == latents.size(1),
             op, "latents, grad_latents, scale: expected [K, d], [K, d] and [K]");
  const auto [from_codes, grad_codebooks] = residual_quantize_backward(
      latents, codebooks, codes, as_dtype(grad_quantized, ScalarType::Float), grad_commitment, grad_codebook_loss);
  const Tensor grad =
      unnormalise(latents, as_dtype(scale, ScalarType::Float), as_dtype(grad_latents, ScalarType::Float), from_codes);
  const int64_t total_units = latents.size(0);
  const std::vector<UnitRows> unit_rows = rows_of_units(in.table(total_units));
  Tensor end_rows = new_tensor(hidden, {total_units, hidden.size(1)}, ScalarType::Float);
  Tensor means = new_tensor(hidden, {total_units, hidden.size(1)}, ScalarType::Float);
  const auto units = static_cast<int64_t>(unit_rows.size());
  gather(in.rows, static_cast<const float*>(in.weights.const_data_ptr()), unit_rows.data(), units,
         static_cast<float*>(end_rows.mutable_data_ptr()), static_cast<float*>(means.mutable_data_ptr()));
  fill_rows(end_rows, units, 0.0f);
  fill_rows(means, units, 0.0f);
  const Tensor grad_means = multiplied(grad, projections.mean);
  const Tensor grad_ends = multiplied(grad, projections.end);
  const IntegrationGradient of_rows =
      integration_gradient(op, in, means, grad_means, static_cast<const float*>(grad_ends.const_data_ptr()));
  const Tensor transposed = torch::stable::transpose(grad, 0, 1);
  return {of_rows.rows, of_rows.weights, as_dtype(multiplied(transposed, end_rows), end_weight.scalar_type()),
          as_dtype(multiplied(transposed, means), mean_weight.scalar_type()), grad_codebooks};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("quantize_ragged", TORCH_BOX(&ztok::quantize_ragged));
  m.impl("quantize_ragged_backward", TORCH_BOX(&ztok::quantize_ragged_backward));
}
