// integrate_units on the CPU: each thread takes the units that begin in its range of rows, so no sum is shared and a
// row is read once (twice where it carries a remainder into the next unit).
#include <cstring>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "units.h"

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
      const int64_t k = table.unit[t];
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

UnitTensors unit_tensors(const char* op, const Tensor& rows, const Tensor& weights, const Tensor& unit,
                         const Tensor& cu_units) {
  ZTOK_CHECK(rows.dim() == 2, op, "rows: expected [T, D], got ", rows.dim(), " dimensions");
  ZTOK_CHECK(weights.dim() == 2 && weights.size(0) == rows.size(0) && weights.size(1) == 2, op,
             "weights: expected [T, 2]");
  ZTOK_CHECK(unit.dim() == 1 && unit.size(0) == rows.size(0), op, "unit: expected [T]");
  ZTOK_CHECK(cu_units.dim() == 1 && cu_units.size(0) > 0, op, "cu_units: expected [B + 1]");
  const bool wide = rows.scalar_type() == ScalarType::Double || weights.scalar_type() == ScalarType::Double;
  const UnitTensors tensors{wide ? as_dtype(rows, ScalarType::Double) : as_contiguous(rows),
                            as_dtype(weights, wide ? ScalarType::Double : ScalarType::Float),
                            as_dtype(unit, ScalarType::Int), as_dtype(cu_units, ScalarType::Int)};
  const UnitTable table = tensors.table(0);
  ZTOK_CHECK(table.cu_units[0] == 0, op, "cu_units[0]: expected 0, got ", table.cu_units[0]);
  ZTOK_CHECK(std::is_sorted(table.cu_units, table.cu_units + table.sequences + 1), op,
             "cu_units: expected non-decreasing offsets");
  return tensors;
}

UnitTable UnitTensors::table(int64_t capacity) const {
  return {static_cast<const int32_t*>(unit.const_data_ptr()), static_cast<const int32_t*>(cu_units.const_data_ptr()),
          cu_units.size(0) - 1, unit.size(0), capacity};
}

int64_t UnitTensors::units() const {
  return static_cast<const int32_t*>(cu_units.const_data_ptr())[cu_units.size(0) - 1];
}

void check_total_units(const char* op, const UnitTensors& tensors, int64_t total_units) {
  ZTOK_CHECK(total_units >= tensors.units(), op, "total_units: expected at least ", tensors.units(), ", got ",
             total_units);
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

IntegrationGradient integration_gradient(const char* op, const UnitTensors& tensors, const Tensor& means,
                                         const Tensor& grad, const float* grad_end_rows) {
  const Tensor &rows = tensors.rows, &weights = tensors.weights;
  for (const Tensor* tensor : {&means, &grad}) {
    ZTOK_CHECK(tensor->dim() == 2 && tensor->size(0) == means.size(0) && tensor->size(1) == rows.size(1) &&
                   tensor->scalar_type() == means.scalar_type() && tensor->is_contiguous(),
               op, "means, grad: expected [K, D] of one dtype");
  }
  const UnitTable table = tensors.table(means.size(0));
  IntegrationGradient out{new_tensor(rows, {rows.size(0), rows.size(1)}), new_tensor(weights, {weights.size(0), 2})};
  if (rows.scalar_type() == ScalarType::Double) {
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

// The ends of units follow from `unit`.
Tensor integrate_units(const Tensor& rows, const Tensor& weights, const Tensor& unit, const Tensor& /*ends*/,
                       const Tensor& cu_units, int64_t total_units) {
  constexpr const char* op = "integrate_units";
  const UnitTensors in = unit_tensors(op, rows, weights, unit, cu_units);
  check_total_units(op, in, total_units);
  const UnitTable table = in.table(in.units());
  Tensor means = new_tensor(in.rows, {total_units, rows.size(1)});
  const int64_t width = rows.size(1), row_bytes = width * static_cast<int64_t>(in.rows.element_size());
  auto* out = static_cast<char*>(means.mutable_data_ptr());
  std::vector<uint8_t> found(table.capacity, 0);
  const auto run = [&](const auto* shares, auto* kernel) {
    for_row_ranges(table.rows, row_bytes, [&](int64_t begin, int64_t end) {
      for_each_unit(table, begin, end, [&](int64_t k, const UnitRows& unit_rows) {
        kernel(in.rows.const_data_ptr(), width, shares, unit_rows, out + k * row_bytes);
        found[k] = 1;
      });
    });
  };
  if (in.rows.scalar_type() == ScalarType::Double) {
    run(static_cast<const double*>(in.weights.const_data_ptr()), unit_mean_f64);
  } else {
    run(static_cast<const float*>(in.weights.const_data_ptr()),
        unit_mean_kernel(op, in.rows.scalar_type(), in.rows.scalar_type()));
  }
  for (int64_t k = 0; k < table.capacity; ++k) {
    if (!found[k]) std::memset(out + k * row_bytes, 0, row_bytes);  // not a unit that halting_units made
  }
  std::memset(out + table.capacity * row_bytes, 0, (total_units - table.capacity) * row_bytes);
  return as_dtype(means, rows.scalar_type());
}

std::tuple<Tensor, Tensor> integrate_units_backward(const Tensor& rows, const Tensor& weights, const Tensor& unit,
                                                    const Tensor& /*ends*/, const Tensor& cu_units, const Tensor& means,
                                                    const Tensor& grad) {
  constexpr const char* op = "integrate_units_backward";
  const UnitTensors in = unit_tensors(op, rows, weights, unit, cu_units);
  const ScalarType dtype = in.rows.scalar_type();
  const IntegrationGradient out = integration_gradient(op, in, as_dtype(means, dtype), as_dtype(grad, dtype), nullptr);
  return {as_dtype(out.rows, rows.scalar_type()), as_dtype(out.weights, weights.scalar_type())};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("integrate_units", TORCH_BOX(&ztok::integrate_units));
  m.impl("integrate_units_backward", TORCH_BOX(&ztok::integrate_units_backward));
}
