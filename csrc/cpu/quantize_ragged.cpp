// quantize_ragged on the CPU: halting, then a block of units at a time is gathered, projected and normalised, and all
// of them are searched. Besides the mass, only rows that have a share in a unit are read.
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "halting.h"
#include "quantize.h"
#include "tensors.h"

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
      if (units[k].end == 0) continue;  // not in the table: only units that halting_units did not make
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
  Tensor out = torch::stable::new_empty(like, {units}, ScalarType::Int);
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

void check_projection(const Tensor& hidden, const Tensor& mass, const Tensor& end_weight, const Tensor& mean_weight,
                      const Tensor& codebooks, int64_t total_units) {
  ZTOK_CHECK(hidden.dim() == 2 && hidden.is_cpu() && hidden.is_contiguous(), kOp,
             "hidden: expected a contiguous CPU tensor [T, D]");
  ZTOK_CHECK(mass.dim() == 1 && mass.size(0) == hidden.size(0) && mass.scalar_type() != ScalarType::Double, kOp,
             "mass: expected [T], not of float64");
  ZTOK_CHECK(codebooks.dim() == 3 && codebooks.is_contiguous() && codebooks.size(0) * codebooks.size(1) > 0, kOp,
             "codebooks: expected a contiguous tensor [L, V, d] that is not empty");
  for (const Tensor* weight : {&end_weight, &mean_weight}) {
    ZTOK_CHECK(weight->dim() == 2 && weight->size(0) == codebooks.size(2) && weight->size(1) == hidden.size(1), kOp,
               "end_weight, mean_weight: expected [d, D]");
  }
  ZTOK_CHECK(total_units >= 0, kOp, "total_units: expected at least 0, got ", total_units);
}

using Outputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs quantize_ragged(const Tensor& hidden, const Tensor& mass, const Tensor& cu_seqlens, const Tensor& end_weight,
                        const Tensor& mean_weight, const Tensor& codebooks, const std::optional<Tensor>& levels,
                        double threshold, bool stop, int64_t total_units) {
  check_projection(hidden, mass, end_weight, mean_weight, codebooks, total_units);
  const int64_t width = codebooks.size(2), num_levels = codebooks.size(0), hidden_width = hidden.size(1);
  HaltingOutput halting = find_units(kOp, mass, cu_seqlens, threshold, stop);
  const UnitTable table = unit_table(kOp, halting.unit, halting.cu_units, total_units);
  const std::vector<UnitRows> unit_rows = rows_of_units(table);
  const auto units = static_cast<int64_t>(unit_rows.size());

  Tensor latents = torch::stable::new_empty(hidden, {total_units, width}, ScalarType::Float);
  Tensor scale = torch::stable::new_empty(hidden, {total_units}, ScalarType::Float);
  const Tensor from_end = torch::stable::transpose(as_float(end_weight), 0, 1);
  const Tensor from_mean = torch::stable::transpose(as_float(mean_weight), 0, 1);
  const auto* weights = static_cast<const float*>(halting.weights.const_data_ptr());
  for (int64_t first = 0; first < units; first += kUnitsPerBlock) {
    const int64_t count = std::min(kUnitsPerBlock, units - first);
    Tensor end_rows = torch::stable::new_empty(hidden, {count, hidden_width}, ScalarType::Float);
    Tensor means = torch::stable::new_empty(hidden, {count, hidden_width}, ScalarType::Float);
    gather(hidden, weights, unit_rows.data() + first, count, static_cast<float*>(end_rows.mutable_data_ptr()),
           static_cast<float*>(means.mutable_data_ptr()));
    normalise(torch::stable::matmul(end_rows, from_end), torch::stable::matmul(means, from_mean), count,
              static_cast<float*>(latents.mutable_data_ptr()) + first * width,
              static_cast<float*>(scale.mutable_data_ptr()) + first);
  }
  fill_rows(latents, units, 0.0f);
  fill_rows(scale, units, 1.0f / std::sqrt(kRmsEps));

  Tensor codes = torch::stable::new_empty(hidden, {total_units, num_levels}, ScalarType::Int);
  Tensor quantized = torch::stable::new_empty(hidden, {total_units, width}, ScalarType::Float);
  Tensor usage = torch::stable::new_empty(hidden, {num_levels, codebooks.size(1)}, ScalarType::Long);
  std::optional<Tensor> unit_levels;
  if (levels.has_value()) unit_levels = levels_of_units(levels, table, units, num_levels, hidden);
  const Matrix rows{latents.const_data_ptr(), Element::float32, units, width, width};
  const float loss = quantize_rows(kOp, rows, codebooks_of(kOp, codebooks), level_counts(kOp, unit_levels, units),
                                   {static_cast<int32_t*>(codes.mutable_data_ptr()), quantized.mutable_data_ptr(),
                                    Element::float32, static_cast<int64_t*>(usage.mutable_data_ptr())});
  fill_rows(codes, units, int32_t(-1));
  fill_rows(quantized, units, 0.0f);
  Tensor commitment = torch::stable::new_empty(hidden, {}, ScalarType::Float);
  Tensor codebook_loss = torch::stable::new_empty(hidden, {}, ScalarType::Float);
  *static_cast<float*>(commitment.mutable_data_ptr()) = loss;
  *static_cast<float*>(codebook_loss.mutable_data_ptr()) = loss;
  return {quantized, latents, commitment,   codebook_loss, halting.weights, codes,
          usage,     scale,   halting.ends, halting.unit,  halting.counts,  halting.cu_units};
}

// For the backward pass: float [total_units, D] each, the rows that end the units and the means; zeros past the last.
std::tuple<Tensor, Tensor> unit_inputs(const Tensor& hidden, const Tensor& weights, const Tensor& unit,
                                       const Tensor& cu_units, int64_t total_units) {
  ZTOK_CHECK(hidden.dim() == 2 && hidden.is_cpu() && hidden.is_contiguous() && unit.dim() == 1 &&
                 unit.size(0) == hidden.size(0) && weights.dim() == 2 && weights.size(0) == hidden.size(0) &&
                 weights.size(1) == 2 && weights.is_contiguous() && weights.scalar_type() == ScalarType::Float,
             kOp, "expected contiguous CPU tensors hidden [T, D], float32 weights [T, 2] and unit [T]");
  const std::vector<UnitRows> unit_rows = rows_of_units(unit_table(kOp, unit, cu_units, total_units));
  const auto units = static_cast<int64_t>(unit_rows.size());
  Tensor end_rows = torch::stable::new_empty(hidden, {total_units, hidden.size(1)}, ScalarType::Float);
  Tensor means = torch::stable::new_empty(hidden, {total_units, hidden.size(1)}, ScalarType::Float);
  gather(hidden, static_cast<const float*>(weights.const_data_ptr()), unit_rows.data(), units,
         static_cast<float*>(end_rows.mutable_data_ptr()), static_cast<float*>(means.mutable_data_ptr()));
  fill_rows(end_rows, units, 0.0f);
  fill_rows(means, units, 0.0f);
  return {end_rows, means};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) {
  m.def(
      "quantize_ragged_native(Tensor hidden, Tensor mass, Tensor cu_seqlens, Tensor end_weight, Tensor mean_weight, "
      "Tensor codebooks, Tensor? levels, float threshold, bool stop, int total_units) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "unit_inputs_native(Tensor hidden, Tensor weights, Tensor unit, Tensor cu_units, int total_units) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("quantize_ragged_native", TORCH_BOX(&ztok::quantize_ragged));
  m.impl("unit_inputs_native", TORCH_BOX(&ztok::unit_inputs));
}
