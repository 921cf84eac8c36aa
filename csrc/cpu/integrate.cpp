// integrate_units on the CPU: each thread takes the units that begin in its range of rows, so no sum is shared and a
// row is read once (twice where it carries a remainder into the next unit).
#include <cstring>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "halting.h"

namespace ztok {
namespace {

// float64, for gradient checks: plain loops.
struct WideShareGradient {
  const void* mean;
  const void* grad;
  double weight;
  double inverse;
  double* grad_weight;
};

void unit_mean_f64(const void* rows, int64_t width, const double* weights, UnitRows unit, void* mean) {
  const auto* values = static_cast<const double*>(rows);
  auto* out = static_cast<double*>(mean);
  std::fill(out, out + width, 0.0);
  const double total = sum_of_weights(weights, unit);
  if (!(total > 0)) return;
  for (int64_t row = unit.carried ? unit.begin - 1 : unit.begin; row < unit.end; ++row) {
    const double weight = weights[row < unit.begin ? 2 * row + 1 : 2 * row];
    for (int64_t i = 0; i < width; ++i) out[i] += weight * values[row * width + i];
  }
  for (int64_t i = 0; i < width; ++i) out[i] /= total;
}

void row_gradient_f64(const void* row, int64_t width, const WideShareGradient* own, const WideShareGradient* carried,
                      const float*, void* grad_row) {
  const auto* values = static_cast<const double*>(row);
  auto* out = static_cast<double*>(grad_row);
  std::fill(out, out + width, 0.0);
  for (const WideShareGradient* share : {own, carried}) {
    double dot = 0;
    const auto* mean = static_cast<const double*>(share->mean);
    const auto* grad = static_cast<const double*>(share->grad);
    for (int64_t i = 0; mean && i < width; ++i) {
      out[i] += share->weight * share->inverse * grad[i];
      dot += share->inverse * grad[i] * (values[i] - mean[i]);
    }
    *share->grad_weight = dot;
  }
}

void check_integration(const char* op, const Tensor& rows, const Tensor& weights, const Tensor& unit,
                       const Tensor& cu_units) {
  ZTOK_CHECK(rows.dim() == 2 && rows.is_cpu() && rows.is_contiguous(), op,
             "rows: expected a contiguous CPU tensor [T, D]");
  const auto wanted = rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  ZTOK_CHECK(weights.dim() == 2 && weights.size(0) == rows.size(0) && weights.size(1) == 2 && weights.is_cpu() &&
                 weights.is_contiguous() && weights.scalar_type() == wanted,
             op, "weights: expected a contiguous CPU tensor [T, 2], float64 for float64 rows and float32 for others");
  ZTOK_CHECK(unit.dim() == 1 && unit.size(0) == rows.size(0) && unit.is_cpu(), op, "unit: expected a CPU tensor [T]");
  ZTOK_CHECK(cu_units.dim() == 1 && cu_units.size(0) > 0 && cu_units.is_cpu(), op,
             "cu_units: expected a CPU tensor [B + 1]");
}

const char* bytes_at(const Tensor& tensor, int64_t row) {
  return static_cast<const char*>(tensor.const_data_ptr()) + row * tensor.size(1) * tensor.element_size();
}

// Share: ShareGradient or WideShareGradient; kernel: the row_gradient function that takes it.
template <typename Share, typename Weight, typename Kernel>
void row_gradients(const UnitTable& table, const Tensor& rows, const Tensor& weights, const Tensor& means,
                   const Tensor& grad, const float* grad_end_rows, const Kernel& kernel, Tensor& grad_rows,
                   Tensor& grad_weights) {
  const int64_t width = rows.size(1), row_bytes = width * static_cast<int64_t>(rows.element_size());
  const auto* shares = static_cast<const Weight*>(weights.const_data_ptr());
  auto* out_weights = static_cast<Weight*>(grad_weights.mutable_data_ptr());
  // 1 / sum of weights of each unit, 0 where it has none; whether the row before a unit carries into it
  std::vector<Weight> inverse(table.capacity, 0);
  std::vector<uint8_t> carried(table.capacity, 0);
  for_row_ranges(table.rows, 2 * sizeof(Weight), [&](int64_t begin, int64_t end) {
    for_each_unit(table, begin, end, [&](int64_t k, const UnitRows& unit) {
      const Weight total = sum_of_weights(shares, unit);
      inverse[k] = total > 0 ? 1 / total : 0;
      carried[k] = unit.carried;
    });
  });
  for_row_ranges(table.rows, row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int32_t k = table.unit[t];
      const bool ends = k >= 0 && (t + 1 == table.rows || table.unit[t + 1] != k);
      const auto share = [&](int64_t of, Weight weight, Weight* grad_weight) {
        const bool has_unit = of >= 0 && of < table.capacity && inverse[of] > 0;
        return Share{has_unit ? bytes_at(means, of) : nullptr, has_unit ? bytes_at(grad, of) : nullptr, weight,
                     has_unit ? inverse[of] : 0, grad_weight};
      };
      const int64_t next =
          ends && t + 1 < table.rows && table.unit[t + 1] == k + 1 && k + 1 < table.capacity && carried[k + 1] ? k + 1
                                                                                                               : -1;
      const Share own = share(k, shares[2 * t], out_weights + 2 * t);
      const Share carries = share(next, shares[2 * t + 1], out_weights + 2 * t + 1);
      const float* added = grad_end_rows && ends && k < table.capacity ? grad_end_rows + k * width : nullptr;
      kernel(bytes_at(rows, t), width, &own, &carries, added,
             static_cast<char*>(grad_rows.mutable_data_ptr()) + t * row_bytes);
    }
  });
}

}  // namespace

UnitTable unit_table(const char* op, const Tensor& unit, const Tensor& cu_units, int64_t capacity) {
  for (const Tensor* tensor : {&unit, &cu_units}) {
    ZTOK_CHECK(tensor->scalar_type() == ScalarType::Int && tensor->is_contiguous() && tensor->is_cpu(), op,
               "unit, cu_units: expected contiguous int32 CPU tensors");
  }
  ZTOK_CHECK(capacity >= 0, op, "total_units: expected at least 0, got ", capacity);
  return {static_cast<const int32_t*>(unit.const_data_ptr()), static_cast<const int32_t*>(cu_units.const_data_ptr()),
          cu_units.size(0) - 1, unit.size(0), capacity};
}

UnitMean unit_mean_kernel(const char* op, ScalarType rows, ScalarType means) {
  ZTOK_CHECK(means == rows || means == ScalarType::Float, op, "means: expected float32 or the dtype of the rows");
  switch (rows) {
    case ScalarType::Float:
      return ZTOK_SELECT(unit_mean_f32_f32);
    case ScalarType::Half:
      return means == rows ? ZTOK_SELECT(unit_mean_f16_f16) : ZTOK_SELECT(unit_mean_f16_f32);
    case ScalarType::BFloat16:
      return means == rows ? ZTOK_SELECT(unit_mean_bf16_bf16) : ZTOK_SELECT(unit_mean_bf16_f32);
    default:
      fail(op, "rows: expected float32, float16 or bfloat16, got ", torch::headeronly::toString(rows));
  }
}

RowGradient row_gradient_kernel(const char* op, ScalarType rows, ScalarType means) {
  ZTOK_CHECK(means == rows || means == ScalarType::Float, op, "means: expected float32 or the dtype of the rows");
  switch (rows) {
    case ScalarType::Float:
      return ZTOK_SELECT(row_gradient_f32_f32);
    case ScalarType::Half:
      return means == rows ? ZTOK_SELECT(row_gradient_f16_f16) : ZTOK_SELECT(row_gradient_f16_f32);
    case ScalarType::BFloat16:
      return means == rows ? ZTOK_SELECT(row_gradient_bf16_bf16) : ZTOK_SELECT(row_gradient_bf16_f32);
    default:
      fail(op, "rows: expected float32, float16 or bfloat16, got ", torch::headeronly::toString(rows));
  }
}

IntegrationGradient integration_gradient(const char* op, const Tensor& rows, const Tensor& weights, const Tensor& unit,
                                         const Tensor& cu_units, const Tensor& means, const Tensor& grad,
                                         const float* grad_end_rows) {
  check_integration(op, rows, weights, unit, cu_units);
  for (const Tensor* tensor : {&means, &grad}) {
    ZTOK_CHECK(tensor->dim() == 2 && tensor->size(0) == means.size(0) && tensor->size(1) == rows.size(1) &&
                   tensor->scalar_type() == means.scalar_type() && tensor->is_cpu() && tensor->is_contiguous(),
               op, "means, grad: expected contiguous CPU tensors [K, D] of one dtype");
  }
  const UnitTable table = unit_table(op, unit, cu_units, means.size(0));
  IntegrationGradient out{torch::stable::new_empty(rows, {rows.size(0), rows.size(1)}),
                          torch::stable::new_empty(weights, {weights.size(0), 2})};
  if (rows.scalar_type() == ScalarType::Double) {
    ZTOK_CHECK(means.scalar_type() == ScalarType::Double && !grad_end_rows, op, "means: expected float64 as the rows");
    row_gradients<WideShareGradient, double>(table, rows, weights, means, grad, nullptr, row_gradient_f64, out.rows,
                                             out.weights);
  } else {
    const RowGradient kernel = row_gradient_kernel(op, rows.scalar_type(), means.scalar_type());
    row_gradients<ShareGradient, float>(table, rows, weights, means, grad, grad_end_rows, kernel, out.rows,
                                        out.weights);
  }
  return out;
}

namespace {

Tensor integrate_units(const Tensor& rows, const Tensor& weights, const Tensor& unit, const Tensor& cu_units,
                       int64_t total_units) {
  const char* op = "integrate_units";
  check_integration(op, rows, weights, unit, cu_units);
  const UnitTable table = unit_table(op, unit, cu_units, total_units);
  Tensor means = torch::stable::new_empty(rows, {total_units, rows.size(1)});
  const int64_t width = rows.size(1), row_bytes = width * static_cast<int64_t>(rows.element_size());
  auto* out = static_cast<char*>(means.mutable_data_ptr());
  const auto run = [&](const auto* shares, auto* kernel) {
    for_row_ranges(table.rows, row_bytes, [&](int64_t begin, int64_t end) {
      for_each_unit(table, begin, end, [&](int64_t k, const UnitRows& units_rows) {
        kernel(rows.const_data_ptr(), width, shares, units_rows, out + k * row_bytes);
      });
    });
  };
  if (rows.scalar_type() == ScalarType::Double) {
    run(static_cast<const double*>(weights.const_data_ptr()), unit_mean_f64);
  } else {
    run(static_cast<const float*>(weights.const_data_ptr()),
        unit_mean_kernel(op, rows.scalar_type(), rows.scalar_type()));
  }
  const int64_t units = std::clamp<int64_t>(table.cu_units[table.sequences], 0, total_units);
  std::memset(out + units * row_bytes, 0, (total_units - units) * row_bytes);
  return means;
}

std::tuple<Tensor, Tensor> integrate_units_backward(const Tensor& rows, const Tensor& weights, const Tensor& unit,
                                                    const Tensor& cu_units, const Tensor& means, const Tensor& grad,
                                                    const std::optional<Tensor>& grad_end_rows) {
  const char* op = "integrate_units_backward";
  if (grad_end_rows.has_value()) {
    ZTOK_CHECK(grad_end_rows->dim() == 2 && grad_end_rows->size(0) == means.size(0) &&
                   grad_end_rows->size(1) == rows.size(1) && grad_end_rows->scalar_type() == ScalarType::Float &&
                   grad_end_rows->is_contiguous() && grad_end_rows->is_cpu(),
               op, "grad_end_rows: expected a contiguous float32 CPU tensor [K, D]");
  }
  const auto* added = grad_end_rows.has_value() ? static_cast<const float*>(grad_end_rows->const_data_ptr()) : nullptr;
  IntegrationGradient out = integration_gradient(op, rows, weights, unit, cu_units, means, grad, added);
  return {out.rows, out.weights};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) {
  m.def("integrate_units_native(Tensor rows, Tensor weights, Tensor unit, Tensor cu_units, int total_units) -> Tensor");
  m.def(
      "integrate_units_backward_native(Tensor rows, Tensor weights, Tensor unit, Tensor cu_units, Tensor means, "
      "Tensor grad, Tensor? grad_end_rows) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("integrate_units_native", TORCH_BOX(&ztok::integrate_units));
  m.impl("integrate_units_backward_native", TORCH_BOX(&ztok::integrate_units_backward));
}
