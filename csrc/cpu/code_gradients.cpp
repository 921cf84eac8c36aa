// The backward passes of codebook_assign and residual_quantize on the CPU, the codes held fixed. Gradients of the rows
// and of the codebooks are two passes over the rows, each of which walks the levels again: nothing of the size of
// [rows, levels, width] is stored. In the second pass every element of the codebooks' gradient belongs to one thread,
// which sees all rows in their order, so that no number of threads shows in a sum.
#include "code_gradients.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "code_gradients_kernel.h"
#include "ragged_copy.h"
#include "share.h"
#include "tensors.h"

namespace ztok {
namespace {

constexpr double kNanosecondsPerElement = 0.2;  // of a row and level, on the way down and up again
constexpr int64_t kLineFloats = 16;             // of a cache line, which two threads should not both write
constexpr int64_t kElementsPerStep = 16 * 1024;

thread_local Scratch scratch;

struct Inputs {
  const char* op;
  Tensor rows, books, codes;  // contiguous, the books float32
  int64_t num_rows, width, levels, size;
  int64_t used;  // pairs of row and level that have a code
};

Inputs checked(const char* op, const char* argument, const Tensor& rows, const Tensor& codebooks, const Tensor& codes) {
  check_search(op, argument, rows, codebooks);
  ZTOK_CHECK(codebooks.dim() == 3, op, "codebooks: expected [L, V, d], got ", codebooks.dim(), " dimensions");
  const int64_t num_rows = rows.size(0), levels = codebooks.size(0), size = codebooks.size(1);
  ZTOK_CHECK(codes.dim() == 2 && codes.size(0) == num_rows && codes.size(1) == levels &&
                 codes.scalar_type() == ScalarType::Int,
             op, "codes: expected int32 [", num_rows, ", ", levels, "]");
  Inputs inputs{
      op, as_contiguous(rows), as_contiguous(codebooks), as_contiguous(codes), num_rows, rows.size(1), levels, size, 0};
  element_of(op, "codebooks", codebooks);
  inputs.books = as_float(inputs.books);
  const auto* values = static_cast<const int32_t*>(inputs.codes.const_data_ptr());
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < num_rows * levels; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
    inputs.used += values[i] >= 0;
  }
  ZTOK_CHECK(low >= -1 && high < size, op, "codes: expected values in [-1, ", size, "), got ", low < -1 ? low : high);
  return inputs;
}

ChosenCodes chosen_codes(const Inputs& inputs, const char* argument, Metric metric) {
  return {matrix_of(inputs.op, argument, inputs.rows),
          static_cast<const float*>(inputs.books.const_data_ptr()),
          static_cast<const int32_t*>(inputs.codes.const_data_ptr()),
          inputs.levels,
          inputs.size,
          metric,
          nullptr,
          nullptr};
}

double nanoseconds(const Inputs& inputs) {
  return kNanosecondsPerElement * static_cast<double>(inputs.num_rows * inputs.levels) *
         static_cast<double>(inputs.width);
}

int64_t rows_per_step(const Inputs& inputs) {
  return std::max<int64_t>(1, kElementsPerStep / (inputs.levels * inputs.width));
}

Tensor row_gradients(const Inputs& inputs, const ChosenCodes& chosen, const void* straight, float scale) {
  Tensor gradients = with_huge_pages(new_tensor(inputs.rows, {inputs.num_rows, inputs.width}));
  void* target = gradients.mutable_data_ptr();
  share(inputs.num_rows, rows_per_step(inputs), nanoseconds(inputs), [&](int64_t begin, int64_t end) {
    ZTOK_SELECT(gradients_of_rows)(chosen, begin, end, straight, scale, target,
                                   scratch.get(walk_floats(inputs.levels)));
  });
  return gradients;
}

Tensor codebook_gradients(const Inputs& inputs, const ChosenCodes& chosen, float scale, ScalarType dtype) {
  Tensor gradients =
      with_huge_pages(new_tensor(inputs.rows, {inputs.levels, inputs.size, inputs.width}, ScalarType::Float));
  auto* sums = static_cast<float*>(gradients.mutable_data_ptr());
  const int64_t row_bytes = inputs.width * static_cast<int64_t>(sizeof(float));
  for_rows(inputs.levels * inputs.size, row_bytes,
           [&](int64_t begin, int64_t end) { std::memset(sums + begin * inputs.width, 0, (end - begin) * row_bytes); });
  // Threads share the columns; where there are more threads than cache lines of a row, the codes as well.
  const double work = nanoseconds(inputs);
  const int64_t lines = (inputs.width + kLineFloats - 1) / kLineFloats;
  const int64_t threads = threads_for(work);
  const int64_t column_parts = std::min(threads, lines);
  const int64_t code_parts = std::min((threads + column_parts - 1) / column_parts, inputs.size);
  share(column_parts * code_parts, 1, work, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t columns = part % column_parts, codes = part / column_parts;
      const auto edge = [&](int64_t p) { return std::min(inputs.width, lines * p / column_parts * kLineFloats); };
      ZTOK_SELECT(add_gradients_of_codes)(chosen, edge(columns), edge(columns + 1), inputs.size * codes / code_parts,
                                          inputs.size * (codes + 1) / code_parts, scale, sums,
                                          scratch.get(walk_floats(inputs.levels)));
    }
  });
  return dtype == ScalarType::Float ? gradients : torch::stable::to(gradients, dtype);
}

std::vector<float> cosine_terms(const Inputs& inputs, const ChosenCodes& chosen) {
  std::vector<float> terms(inputs.num_rows * inputs.levels * kCosineTerms);
  share(inputs.num_rows, rows_per_step(inputs), 4 * nanoseconds(inputs), [&](int64_t begin, int64_t end) {
    ZTOK_SELECT(find_cosine_terms)(chosen, begin, end, scratch.get(inputs.width), terms.data());
  });
  return terms;
}

std::tuple<Tensor, Tensor> codebook_assign_backward(const Tensor& x, const Tensor& codebooks, const Tensor& codes,
                                                    const Tensor& grad_distances, const std::string& metric_name) {
  constexpr const char* kOp = "codebook_assign_backward";
  const Inputs inputs = checked(kOp, "x", x, codebooks, codes);
  const Tensor weights = as_float(as_contiguous(grad_distances));
  ZTOK_CHECK(weights.dim() == 2 && weights.size(0) == inputs.num_rows && weights.size(1) == inputs.levels, kOp,
             "grad_distances: expected [", inputs.num_rows, ", ", inputs.levels, "]");
  const Metric metric = metric_of(kOp, metric_name);
  ChosenCodes chosen = chosen_codes(inputs, "x", metric);
  chosen.weights = static_cast<const float*>(weights.const_data_ptr());
  std::vector<float> terms;
  if (metric == Metric::cosine) terms = cosine_terms(inputs, chosen);
  chosen.cosine_terms = terms.data();
  const float scale = metric == Metric::l2 ? 2.0f : 1.0f;
  return {row_gradients(inputs, chosen, nullptr, scale),
          codebook_gradients(inputs, chosen, scale, codebooks.scalar_type())};
}

double value_of(const char* op, const char* argument, const Tensor& scalar) {
  ZTOK_CHECK(scalar.numel() == 1, op, argument, ": expected one element, got ", scalar.numel());
  return *static_cast<const float*>(as_float(scalar).const_data_ptr());
}

}  // namespace

// With e_l = z - q_{<=l} and N used pairs, both losses are sum_l |e_l|^2 / (N d); the commitment sees z alone, the
// codebook loss the codes alone.
std::tuple<Tensor, Tensor> residual_quantize_backward(const Tensor& latents, const Tensor& codebooks,
                                                      const Tensor& codes, const Tensor& grad_quantized,
                                                      const Tensor& grad_commitment, const Tensor& grad_codebook_loss) {
  constexpr const char* kOp = "residual_quantize_backward";
  const Inputs inputs = checked(kOp, "latents", latents, codebooks, codes);
  ZTOK_CHECK(grad_quantized.dim() == 2 && grad_quantized.size(0) == inputs.num_rows &&
                 grad_quantized.size(1) == inputs.width && grad_quantized.scalar_type() == latents.scalar_type(),
             kOp, "grad_quantized: expected the shape and dtype of latents");
  const Tensor straight = as_contiguous(grad_quantized);
  const double factor =
      2 / (static_cast<double>(std::max<int64_t>(inputs.used, 1)) * static_cast<double>(inputs.width));
  const auto by_rows = static_cast<float>(factor * value_of(kOp, "grad_commitment", grad_commitment));
  const auto by_codes = static_cast<float>(factor * value_of(kOp, "grad_codebook_loss", grad_codebook_loss));
  const ChosenCodes chosen = chosen_codes(inputs, "latents", Metric::l2);
  return {row_gradients(inputs, chosen, straight.const_data_ptr(), by_rows),
          codebook_gradients(inputs, chosen, by_codes, codebooks.scalar_type())};
}

}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("codebook_assign_backward", TORCH_BOX(&ztok::codebook_assign_backward));
  m.impl("residual_quantize_backward", TORCH_BOX(&ztok::residual_quantize_backward));
}
