// halting_units on the CPU: one pass over the mass. A row costs some nanoseconds, a hundredth of what reading its
// hidden state costs, so the rows of a sequence are not shared between threads.
#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "check.h"
#include "new_tensor.h"
#include "ragged.h"

namespace ztok {
namespace {

// The mass is counted in multiples of threshold / 2**20, so that its prefix sums are exact.
constexpr int kFractionBits = 20;
constexpr int64_t kOne = int64_t(1) << kFractionBits;

template <typename Mass>
inline int64_t quanta(Mass mass, double scale) {
  const double scaled = std::nearbyint(static_cast<double>(mass) * scale);
  // a NaN fails both comparisons
  return scaled >= kOne ? kOne : scaled > 0 ? static_cast<int64_t>(scaled) : 0;
}

template <typename Mass>
inline double finite(Mass mass) {
  const double value = static_cast<double>(mass);
  if (std::isnan(value)) return 0;
  const double largest = sizeof(Mass) == 8 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  return std::isinf(value) ? (value > 0 ? largest : -largest) : value;
}

template <typename Offset>
void check_offsets(const char* op, const Offset* offsets, int64_t sequences, int64_t rows) {
  ZTOK_CHECK(offsets[0] == 0, op, "cu_seqlens[0]: expected 0, got ", offsets[0]);
  for (int64_t s = 0; s < sequences; ++s) {
    ZTOK_CHECK(offsets[s] <= offsets[s + 1], op, "cu_seqlens: expected non-decreasing offsets, got ", offsets[s],
               " before ", offsets[s + 1], " at sequence ", s);
  }
  ZTOK_CHECK(offsets[sequences] == rows, op, "cu_seqlens[-1]: expected ", rows, ", got ", offsets[sequences]);
}

template <typename Mass, typename Weight>
struct Sequence {
  const Mass* mass;
  int64_t rows;
  double threshold;

  // Writes from the sequence's first row on; returns how many units there are.
  int32_t fire(int32_t first_unit, Weight* weights, bool* ends, int32_t* unit) const {
    const double scale = kOne / threshold, quantum = threshold / kOne;
    int64_t filled = 0;
    int32_t k = first_unit;
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t q = quanta(mass[t], scale);
      const bool last = t + 1 == rows;
      const int64_t sum = filled + q;
      const bool fires = sum >= kOne;
      unit[t] = k;
      ends[t] = fires || last;
      weights[2 * t] = static_cast<Weight>((fires ? kOne - filled : q) * quantum);
      filled = fires ? sum - kOne : sum;
      weights[2 * t + 1] = static_cast<Weight>((fires && !last ? filled : 0) * quantum);
      k += fires || last;
    }
    return k - first_unit;
  }

  int64_t rows_until_stop() const {
    for (int64_t t = 0; t < rows; ++t) {
      if (static_cast<double>(mass[t]) >= threshold) return t + 1;
    }
    return rows;
  }

  int32_t stop(int32_t first_unit, Weight* weights, bool* ends, int32_t* unit) const {
    const int64_t open = rows_until_stop();
    for (int64_t t = 0; t < rows; ++t) {
      unit[t] = t < open ? first_unit : -1;
      ends[t] = t + 1 == open;
      weights[2 * t] = t < open ? static_cast<Weight>(finite(mass[t])) : Weight(0);
      weights[2 * t + 1] = 0;
    }
    return rows > 0;
  }

  // In units of the fixed point, d own = d mass_t where the row does not fire and -dC_{t-1} where it does, d carried =
  // dC_t; C is the prefix sum. So the mass of a row gathers what the rows after it have, from the last to the first.
  void fire_gradient(const Weight* grad_weights, Mass* grad) const {
    const double scale = kOne / threshold;
    int64_t prefix = 0;
    for (int64_t t = 0; t < rows; ++t) prefix += quanta(mass[t], scale);
    double later = 0;
    for (int64_t t = rows - 1; t >= 0; --t) {
      const int64_t before = prefix - quanta(mass[t], scale);
      const bool fires = (prefix >> kFractionBits) > (before >> kFractionBits);
      const double own = grad_weights[2 * t];
      if (fires && t + 1 < rows) later += grad_weights[2 * t + 1];  // by C_t, of which the row itself is a part
      grad[t] = static_cast<Mass>(fires ? later : later + own);
      if (fires) later -= own;
      prefix = before;
    }
  }

  void stop_gradient(const Weight* grad_weights, Mass* grad) const {
    const int64_t open = rows_until_stop();
    for (int64_t t = 0; t < rows; ++t) grad[t] = t < open ? static_cast<Mass>(grad_weights[2 * t]) : Mass(0);
  }
};

// Mass in the range that halting_units states: at most the threshold, rounded as the mass is, or for "stop" finite.
template <typename Mass>
void check_mass_values(const char* op, const Mass* mass, int64_t rows, double threshold, bool stop) {
  const auto upper = stop ? std::numeric_limits<Mass>::max() : static_cast<Mass>(static_cast<float>(threshold));
  bool valid = true;
  for (int64_t t = 0; t < rows; ++t) valid &= (mass[t] >= Mass(0)) & (mass[t] <= upper);
  ZTOK_CHECK(valid, op, "mass: expected values in the range of the mode");
}

// Rows in a task below which a second thread costs more than the rows.
constexpr int64_t kRowsPerTask = 8192;

// visit(sequence number, first row, rows) for all sequences, in order or, if parallel, in threads.
template <typename Visit>
void for_each_sequence(const char* op, const Tensor& cu_seqlens, int64_t rows, bool parallel, const Visit& visit) {
  const auto loop = [&](const auto* offsets) {
    const int64_t sequences = cu_seqlens.size(0) - 1;
    check_offsets(op, offsets, sequences, rows);
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) visit(s, int64_t(offsets[s]), int64_t(offsets[s + 1] - offsets[s]));
    };
    if (!parallel) return some(0, sequences);
    const int64_t sequences_per_task = kRowsPerTask * sequences / std::max<int64_t>(rows, 1);
    torch::stable::parallel_for(0, sequences, std::max<int64_t>(1, sequences_per_task), some);
  };
  if (cu_seqlens.scalar_type() == ScalarType::Long) {
    loop(static_cast<const int64_t*>(cu_seqlens.const_data_ptr()));
  } else {
    loop(static_cast<const int32_t*>(cu_seqlens.const_data_ptr()));
  }
}

// run(Mass(), Weight()) for the mass' dtype and that of its weights.
template <typename Run>
void with_types(const char* op, const Tensor& mass, const Run& run) {
  switch (mass.scalar_type()) {
    case ScalarType::Float:
      return run(float(), float());
    case ScalarType::Double:
      return run(double(), double());
    case ScalarType::Half:
      return run(c10::Half(), float());
    case ScalarType::BFloat16:
      return run(c10::BFloat16(), float());
    default:
      fail(op, "mass: expected a floating-point dtype, got ", torch::headeronly::toString(mass.scalar_type()));
  }
}

void check_mass(const char* op, const Tensor& mass, const Tensor& cu_seqlens) {
  ZTOK_CHECK(mass.dim() == 1, op, "mass: expected [T], got ", mass.dim(), " dimensions");
  ZTOK_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, op, "cu_seqlens: expected [B + 1]");
  ZTOK_CHECK(cu_seqlens.scalar_type() == ScalarType::Int || cu_seqlens.scalar_type() == ScalarType::Long, op,
             "cu_seqlens: expected dtype int32 or int64");
}

bool is_stop(const char* op, const std::string& mode) {
  ZTOK_CHECK(mode == "fire" || mode == "stop", op, "mode: expected fire or stop, got ", mode);
  return mode == "stop";
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs halting_units(const Tensor& given_mass, const Tensor& given_offsets, double threshold,
                      const std::string& mode) {
  constexpr const char* op = "halting_units";
  check_mass(op, given_mass, given_offsets);
  const bool stop = is_stop(op, mode);
  const Tensor mass = as_contiguous(given_mass), cu_seqlens = as_contiguous(given_offsets);
  const int64_t rows = mass.size(0), sequences = cu_seqlens.size(0) - 1;
  const bool wide = mass.scalar_type() == ScalarType::Double;
  Tensor out_weights = new_tensor(mass, {rows, 2}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor out_ends = new_tensor(mass, {rows}, ScalarType::Bool);
  Tensor out_unit = new_tensor(mass, {rows}, ScalarType::Int);
  Tensor out_counts = new_tensor(mass, {sequences}, ScalarType::Int);
  Tensor out_offsets = new_tensor(mass, {sequences + 1}, ScalarType::Int);
  auto* ends = static_cast<bool*>(out_ends.mutable_data_ptr());
  auto* unit = static_cast<int32_t*>(out_unit.mutable_data_ptr());
  auto* counts = static_cast<int32_t*>(out_counts.mutable_data_ptr());
  auto* cu_units = static_cast<int32_t*>(out_offsets.mutable_data_ptr());
  cu_units[0] = 0;
  with_types(op, mass, [&](auto mass_type, auto weight_type) {
    using Mass = decltype(mass_type);
    using Weight = decltype(weight_type);
    const auto* masses = static_cast<const Mass*>(mass.const_data_ptr());
    auto* weights = static_cast<Weight*>(out_weights.mutable_data_ptr());
    check_mass_values(op, masses, rows, threshold, stop);
    for_each_sequence(op, cu_seqlens, rows, false, [&](int64_t s, int64_t first, int64_t length) {
      const Sequence<Mass, Weight> sequence{masses + first, length, threshold};
      counts[s] = stop ? sequence.stop(cu_units[s], weights + 2 * first, ends + first, unit + first)
                       : sequence.fire(cu_units[s], weights + 2 * first, ends + first, unit + first);
      cu_units[s + 1] = cu_units[s] + counts[s];
    });
  });
  return {out_weights, out_ends, out_unit, out_counts, out_offsets};
}

Tensor halting_units_backward(const Tensor& given_mass, const Tensor& given_offsets, const Tensor& given_grad,
                              double threshold, const std::string& mode) {
  constexpr const char* op = "halting_units_backward";
  check_mass(op, given_mass, given_offsets);
  const bool stop = is_stop(op, mode);
  const Tensor mass = as_contiguous(given_mass), cu_seqlens = as_contiguous(given_offsets);
  const Tensor grad_weights = as_contiguous(given_grad);
  Tensor grad = new_tensor(mass, {mass.size(0)});
  with_types(op, mass, [&](auto mass_type, auto weight_type) {
    using Mass = decltype(mass_type);
    using Weight = decltype(weight_type);
    const auto wanted = sizeof(Weight) == 8 ? ScalarType::Double : ScalarType::Float;
    ZTOK_CHECK(grad_weights.dim() == 2 && grad_weights.size(0) == mass.size(0) && grad_weights.size(1) == 2 &&
                   grad_weights.scalar_type() == wanted,
               op, "grad_weights: expected [T, 2] of the dtype of the weights");
    const auto* masses = static_cast<const Mass*>(mass.const_data_ptr());
    const auto* grads = static_cast<const Weight*>(grad_weights.const_data_ptr());
    auto* out = static_cast<Mass*>(grad.mutable_data_ptr());
    for_each_sequence(op, cu_seqlens, mass.size(0), true, [&](int64_t, int64_t first, int64_t length) {
      const Sequence<Mass, Weight> sequence{masses + first, length, threshold};
      stop ? sequence.stop_gradient(grads + 2 * first, out + first)
           : sequence.fire_gradient(grads + 2 * first, out + first);
    });
  });
  return grad;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("halting_units", TORCH_BOX(&ztok::halting_units));
  m.impl("halting_units_backward", TORCH_BOX(&ztok::halting_units_backward));
}
