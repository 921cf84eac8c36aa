// z_select on the CPU: blocks of codes are shared among threads, each row's best is merged from their candidates.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "pack_kernel.h"
#include "share.h"
#include "tensors.h"
#include "zhead_kernel.h"

namespace ztok {
namespace {

constexpr const char* kOp = "z_select";

struct Sampling {
  double temperature, top_p;
  int64_t seed, step;
};

struct Choice {
  int32_t code;
  float log_prob;
};

constexpr Choice kNone{0, std::numeric_limits<float>::quiet_NaN()};

double noise_of(const DrawKey& key, int64_t code) {
  uint32_t words[4];
  draw_words<1>(key, static_cast<uint32_t>(code / 4), words);
  return gumbel_of(words[code % 4]);
}

// The codes of the smallest set whose probability reaches top_p; of equally probable codes the lower ones come first.
std::vector<bool> nucleus(const std::vector<double>& scores, double top_p) {
  const double largest = *std::max_element(scores.begin(), scores.end());
  std::vector<double> probabilities(scores.size());
  double sum = 0;
  for (size_t i = 0; i < scores.size(); ++i) sum += probabilities[i] = std::exp(scores[i] - largest);
  for (double& probability : probabilities) probability /= sum;
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return probabilities[a] > probabilities[b]; });
  std::vector<bool> allowed(scores.size(), false);
  double before = 0;
  for (int32_t code : order) {
    if (before >= top_p) break;
    allowed[code] = true;
    before += probabilities[code];
  }
  return allowed;
}

// One row by the definition, all its logits in float64: for top_p, which needs them sorted, and for numbers that
// float32 cannot hold.
Choice choose_exactly(const float* hidden, const Matrix& codes, const DrawKey& key, const Sampling& sampling) {
  std::vector<double> logits(codes.rows), scores(codes.rows);
  for (int64_t code = 0; code < codes.rows; ++code) {
    logits[code] = ZTOK_SELECT(z_logit)(hidden, codes, code);
    if (!std::isfinite(logits[code])) return kNone;
  }
  std::vector<bool> allowed;
  if (sampling.temperature == 0) {
    scores = logits;
  } else {
    for (int64_t code = 0; code < codes.rows; ++code) scores[code] = logits[code] / sampling.temperature;
    if (sampling.top_p < 1) allowed = nucleus(scores, sampling.top_p);
    for (int64_t code = 0; code < codes.rows; ++code) {
      if (allowed.empty() || allowed[code]) scores[code] += noise_of(key, code);
    }
  }
  int64_t best = -1;
  for (int64_t code = 0; code < codes.rows; ++code) {
    if (!allowed.empty() && !allowed[code]) continue;
    if (best < 0 || scores[code] > scores[best]) best = code;
  }
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double logit : logits) sum += std::exp(logit - largest);
  return {static_cast<int32_t>(best), static_cast<float>(logits[best] - largest - std::log(sum))};
}

// The winner among what the threads kept of row `row`; rows[part * stride] is what part `part` knows of it.
Choice merge(const ZRow* rows, int64_t parts, int64_t stride, const float* hidden, const Matrix& codes,
             const Sampling& sampling, const ZMass* masses, int64_t blocks) {
  float lower = -std::numeric_limits<float>::infinity();
  for (int64_t part = 0; part < parts; ++part) {
    const ZRow& row = rows[part * stride];
    if (row.count == kZNotFinite) return kNone;
    if (row.count == kZExact) return choose_exactly(hidden, codes, row.key, sampling);
    lower = std::max(lower, row.lower);
  }
  ZCandidate best{-1, 0, 0};
  double most = 0, logit_of_best = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const ZRow& row = rows[part * stride];
    for (int i = 0; i < row.count; ++i) {
      if (row.candidates[i].upper < lower) continue;
      const ZCandidate& candidate = row.candidates[i];
      const double logit = ZTOK_SELECT(z_logit)(hidden, codes, candidate.code);
      double score = logit;
      if (sampling.temperature != 0) score = logit / sampling.temperature + noise_of(row.key, candidate.code);
      // of equal codes the lowest, whichever thread has it
      const bool first = score == most && candidate.code < best.code;
      if (best.code < 0 || score > most || first) most = score, best = candidate, logit_of_best = logit;
    }
  }
  float largest = masses[0].largest;
  for (int64_t b = 1; b < blocks; ++b) largest = std::max(largest, masses[b].largest);
  // The chosen code takes part with its exact logit: where it has most of the mass, its error would be the result's.
  double sum = std::exp(logit_of_best - largest) - std::exp(static_cast<double>(best.logit) - largest);
  for (int64_t b = 0; b < blocks; ++b) {
    sum += masses[b].sum * std::exp(static_cast<double>(masses[b].largest) - largest);
  }
  return {best.code, static_cast<float>(logit_of_best - largest - std::log(sum))};
}

// Up to kZRows rows, from row `first` on.
void select_rows(const float* hidden, int64_t first, int64_t count, const Matrix& codes, const Sampling& sampling,
                 const int64_t* row_ids, int32_t* chosen, float* log_probs) {
  const int64_t blocks = (codes.rows + kBlockCodes - 1) / kBlockCodes;
  const ZQuery query{hidden + first * codes.width, count, codes, sampling.temperature};
  if (row_ids != nullptr) row_ids += first;
  const double elements = static_cast<double>(codes.rows) * codes.width;
  const int64_t element_bytes = codes.element == Element::float32 ? 4 : 2;
  const int64_t threads =
      threads_for(elements * (count / kProductsPerNanosecond + element_bytes / kBytesPerNanosecond));
  const bool exactly = sampling.temperature != 0 && sampling.top_p < 1;
  const int64_t parts = exactly ? 1 : std::min(threads, blocks);
  std::vector<ZRow> rows(parts * count);
  Buffer<ZMass> masses(count * blocks);
  share_among(parts, exactly ? 0 : blocks, 4, [&](int64_t part, const auto& claims) {
    Buffer<float> scores(kZRows * kBlockCodes);
    ZRow* own = rows.data() + part * count;
    ZTOK_SELECT(z_begin)(query, sampling.seed, row_ids, first, sampling.step, own);
    claims([&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        ZTOK_SELECT(z_block)(query, b, own, masses.get() + b, blocks, scores.get());
      }
    });
  });
  const auto rerank_rows = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = query.hidden + r * codes.width;
      Choice choice = kNone;
      if (!exactly) {
        choice = merge(rows.data() + r, parts, count, row, codes, sampling, masses.get() + r * blocks, blocks);
      } else if (rows[r].count != kZNotFinite) {
        choice = choose_exactly(row, codes, rows[r].key, sampling);
      }
      chosen[first + r] = choice.code;
      log_probs[first + r] = choice.log_prob;
    }
  };
  // Worth a second round of threads only where whole rows are to be computed.
  if (exactly) {
    torch::stable::parallel_for(0, count, 1, rerank_rows);
  } else {
    rerank_rows(0, count);
  }
}

std::tuple<Tensor, Tensor> z_select(const Tensor& hidden, const Tensor& codes, double temperature, double top_p,
                                    int64_t seed, const std::optional<Tensor>& row_ids, int64_t step) {
  ZTOK_CHECK(hidden.dim() == 2, kOp, "hidden: expected [B, D], got ", hidden.dim(), " dimensions");
  ZTOK_CHECK(codes.dim() == 2 && codes.size(0) > 0 && codes.size(1) == hidden.size(1) && codes.size(1) > 0, kOp,
             "rows: expected [V, D] with the width of hidden and at least one row");
  ZTOK_CHECK(!row_ids.has_value() || (row_ids->scalar_type() == ScalarType::Long && row_ids->dim() == 1 &&
                                      row_ids->size(0) == hidden.size(0)),
             kOp, "row_ids: expected int64 [B]");
  const int64_t batch = hidden.size(0), width = hidden.size(1);
  Tensor chosen = new_tensor(hidden, {batch}, ScalarType::Int);
  Tensor log_probs = new_tensor(hidden, {batch}, ScalarType::Float);
  const Tensor states = with_adjacent_elements(hidden), table = with_adjacent_elements(codes);
  Buffer<float> floats(batch * width);
  ZTOK_SELECT(to_floats)(matrix_of(kOp, "hidden", states), 0, batch, floats.get());
  const Matrix matrix = matrix_of(kOp, "rows", table);
  const std::optional<Tensor> ids =
      row_ids.has_value() ? std::optional(torch::stable::contiguous(*row_ids)) : std::nullopt;
  for (int64_t first = 0; first < batch; first += kZRows) {
    select_rows(floats.get(), first, std::min(kZRows, batch - first), matrix, {temperature, top_p, seed, step},
                ids.has_value() ? ids->const_data_ptr<int64_t>() : nullptr, chosen.mutable_data_ptr<int32_t>(),
                log_probs.mutable_data_ptr<float>());
  }
  return {chosen, log_probs};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("z_select", TORCH_BOX(&ztok::z_select)); }
