// The engine's head on the CPU: logits, the greatest of them, or a draw. See docs/determinism.md.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "engine_draw.h"
#include "engine_linear.h"

namespace ztok {
namespace {

constexpr int64_t kBlockRows = 64, kBlockPanels = 32;

// Hidden rows with their bias, quantised where the model is.
class HeadRows {
 public:
  HeadRows(const char* op, const EngineModel& model, const Tensor& hidden, const std::optional<Tensor>& bias)
      : count(hidden.dim() == 2 ? hidden.size(0) : -1),
        width_(model.hidden),
        floats_(bias.has_value() && count > 0 ? count * width_ : 0),
        bytes_(model.is_int8 && count > 0 ? count * padded_depth(width_) : 0),
        sums_(std::max<int64_t>(count, 0)),
        scales_(std::max<int64_t>(count, 0)) {
    check(op, "hidden", hidden);
    if (bias.has_value()) check(op, "bias", *bias);
    const auto* rows = hidden.const_data_ptr<float>();
    const float* added = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
    all = {added == nullptr ? rows : floats_.get(),
           width_,
           {bytes_.get(), padded_depth(width_), sums_.get(), scales_.get()}};
    share(count, kBlockRows, static_cast<double>(count) * width_ * 8 / kBytesPerNanosecond,
          [&](int64_t begin, int64_t end) {
            StandardArithmetic standard;
            for (int64_t i = begin * width_; added != nullptr && i < end * width_; ++i) floats_[i] = rows[i] + added[i];
            for (int64_t row = begin; model.is_int8 && row < end; ++row) {
              quantise_row(all.floats + row * width_, width_, all.quantised, row);
            }
          });
  }

  int64_t count;
  EngineRows all;

 private:
  void check(const char* op, const char* name, const Tensor& tensor) const {
    ZTOK_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 && tensor.is_contiguous() &&
                   tensor.size(0) == count && tensor.size(1) == width_,
               op, name, ": expected contiguous float32 [rows, ", width_, "]");
  }

  int64_t width_;
  Buffer<float> floats_;
  Buffer<int8_t> bytes_;
  Buffer<int32_t> sums_;
  Buffer<float> scales_;
};

// use(products, first row, first column, number of the block of columns), shared among threads.
template <typename Use>
void for_blocks(const EngineModel& model, const HeadRows& rows, const Use& use) {
  const int64_t panels = model.head_linear.num_panels(), row_blocks = (rows.count + kBlockRows - 1) / kBlockRows;
  const int64_t column_blocks = (panels + kBlockPanels - 1) / kBlockPanels;
  const double nanoseconds = static_cast<double>(rows.count) * model.vocabulary * model.hidden / kProductsPerNanosecond;
  share(row_blocks * column_blocks, 1, nanoseconds, [&](int64_t begin, int64_t end) {
    StandardArithmetic standard;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / row_blocks, first = item % row_blocks * kBlockRows;
      engine_products(model.head_linear, rows.all, first, std::min(kBlockRows, rows.count - first),
                      block * kBlockPanels, std::min(panels, (block + 1) * kBlockPanels),
                      [&](const Products& products, int64_t column) { use(products, first, column, block); });
    }
  });
}

Tensor logits_of(const EngineModel& model, const Tensor& hidden, const HeadRows& rows) {
  Tensor logits = new_tensor(hidden, {rows.count, model.vocabulary});
  auto* out = logits.mutable_data_ptr<float>();
  for_blocks(model, rows, [&](const Products& products, int64_t first, int64_t column, int64_t) {
    ZTOK_SELECT(engine_store)(products, out + first * model.vocabulary + column, model.vocabulary);
  });
  return logits;
}

Tensor engine_logits(const Tensor& weights, const Tensor& layout, const Tensor& hidden,
                     const std::optional<Tensor>& bias) {
  const EngineModel model("engine_logits", weights, layout);
  return logits_of(model, hidden, HeadRows("engine_logits", model, hidden, bias));
}

// -1 in rows without a token, where a logit is NaN or the greatest is not finite; engine_sample too.
Tensor engine_argmax(const Tensor& weights, const Tensor& layout, const Tensor& hidden,
                     const std::optional<Tensor>& bias) {
  const EngineModel model("engine_argmax", weights, layout);
  const HeadRows rows("engine_argmax", model, hidden, bias);
  const int64_t blocks = (model.head_linear.num_panels() + kBlockPanels - 1) / kBlockPanels;
  std::vector<float> best(blocks * rows.count, -std::numeric_limits<float>::infinity());
  std::vector<int64_t> index(blocks * rows.count, -1);
  for_blocks(model, rows, [&](const Products& products, int64_t first, int64_t column, int64_t block) {
    const int64_t at = block * rows.count + first;
    ZTOK_SELECT(engine_best)(products, column, best.data() + at, index.data() + at);
  });
  Tensor result = new_tensor(hidden, {rows.count}, ScalarType::Long);
  auto* out = result.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows.count; ++row) {
    float greatest = -std::numeric_limits<float>::infinity();
    out[row] = -1;
    for (int64_t block = 0; block < blocks && !std::isnan(greatest); ++block) {
      const float value = best[block * rows.count + row];
      if (!(value <= greatest)) {
        greatest = value;
        out[row] = index[block * rows.count + row];
      }
    }
    if (!std::isfinite(greatest)) out[row] = -1;
  }
  return result;
}

// A choice for each row of logits, by the sampling rule; -1 as in engine_argmax.
Tensor draw_rows(const char* op, const Tensor& logits, double temperature, double top_p, int64_t seed,
                 const Tensor& row_ids, const Tensor& steps) {
  ZTOK_CHECK(temperature > 0 && std::isfinite(temperature), op, "temperature: expected a positive number, got ",
             temperature);
  ZTOK_CHECK(top_p > 0 && top_p <= 1, op, "top_p: expected a number in (0, 1], got ", top_p);
  const int64_t rows = logits.size(0), count = logits.size(1);
  for (const Tensor* ids : {&row_ids, &steps}) {
    ZTOK_CHECK(
        ids->scalar_type() == ScalarType::Long && ids->dim() == 1 && ids->size(0) == rows && ids->is_contiguous(), op,
        "row_ids, steps: expected contiguous int64 vectors of ", rows, " elements");
  }
  Tensor result = new_tensor(logits, {rows}, ScalarType::Long);
  const auto* logit = logits.const_data_ptr<float>();
  const auto *ids = row_ids.const_data_ptr<int64_t>(), *step = steps.const_data_ptr<int64_t>();
  auto* out = result.mutable_data_ptr<int64_t>();
  share(rows, 1, static_cast<double>(rows) * count * 10, [&](int64_t begin, int64_t end) {
    StandardArithmetic standard;
    std::vector<int64_t> weight(count);
    std::vector<Candidate> heap;
    for (int64_t row = begin; row < end; ++row) {
      const bool finite =
          ZTOK_SELECT(engine_weights)(logit + row * count, count, static_cast<float>(temperature), weight.data());
      out[row] = finite ? draw(weight.data(), count, top_p, random_bits(seed, ids[row], step[row]), heap) : -1;
    }
  });
  return result;
}

Tensor engine_sample(const Tensor& weights, const Tensor& layout, const Tensor& hidden,
                     const std::optional<Tensor>& bias, double temperature, double top_p, int64_t seed,
                     const Tensor& row_ids, const Tensor& steps) {
  constexpr const char* kOp = "engine_sample";
  const EngineModel model(kOp, weights, layout);
  const HeadRows rows(kOp, model, hidden, bias);
  return draw_rows(kOp, logits_of(model, hidden, rows), temperature, top_p, seed, row_ids, steps);
}

void check_logits(const char* op, const Tensor& logits) {
  ZTOK_CHECK(
      logits.scalar_type() == ScalarType::Float && logits.dim() == 2 && logits.size(1) > 0 && logits.is_contiguous(),
      op, "logits: expected a contiguous float32 matrix with columns");
}

Tensor engine_draw(const Tensor& logits, double temperature, double top_p, int64_t seed, const Tensor& row_ids,
                   const Tensor& steps) {
  constexpr const char* kOp = "engine_draw";
  check_logits(kOp, logits);
  return draw_rows(kOp, logits, temperature, top_p, seed, row_ids, steps);
}

// The integer weights of the sampling rule, int64 [r, n]; zeros in a row that has no choice.
Tensor engine_weights_of(const Tensor& logits, double temperature) {
  constexpr const char* kOp = "engine_weights";
  check_logits(kOp, logits);
  ZTOK_CHECK(temperature > 0 && std::isfinite(temperature), kOp, "temperature: expected a positive number, got ",
             temperature);
  const int64_t rows = logits.size(0), count = logits.size(1);
  Tensor result = new_tensor(logits, {rows, count}, ScalarType::Long);
  const auto* logit = logits.const_data_ptr<float>();
  auto* out = result.mutable_data_ptr<int64_t>();
  StandardArithmetic standard;
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* own = out + row * count;
    if (!ZTOK_SELECT(engine_weights)(logit + row * count, count, static_cast<float>(temperature), own)) {
      std::fill_n(own, count, 0);
    }
  }
  return result;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) {
  m.def("engine_logits(Tensor weights, Tensor layout, Tensor hidden, Tensor? bias) -> Tensor");
  m.def("engine_argmax(Tensor weights, Tensor layout, Tensor hidden, Tensor? bias) -> Tensor");
  m.def(
      "engine_sample(Tensor weights, Tensor layout, Tensor hidden, Tensor? bias, float temperature, float top_p, "
      "int seed, Tensor row_ids, Tensor steps) -> Tensor");
  m.def("engine_weights(Tensor logits, float temperature) -> Tensor");
  m.def("engine_draw(Tensor logits, float temperature, float top_p, int seed, Tensor row_ids, Tensor steps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("engine_logits", TORCH_BOX(&ztok::engine_logits));
  m.impl("engine_argmax", TORCH_BOX(&ztok::engine_argmax));
  m.impl("engine_sample", TORCH_BOX(&ztok::engine_sample));
  m.impl("engine_weights", TORCH_BOX(&ztok::engine_weights_of));
  m.impl("engine_draw", TORCH_BOX(&ztok::engine_draw));
}
