// token_scores on the CPU: threads take blocks of rows; a block of codes is packed once per block of rows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "buffer.h"
#include "pack_kernel.h"
#include "share.h"
#include "tensors.h"
#include "token_scores_kernel.h"

namespace ztok {
namespace {

constexpr const char* kOp = "token_scores";
constexpr int64_t kBlockRows = 192;  // enough that packing the codes is a few per cent of the work
constexpr double kBitsPerNat = 1.4426950408889634;

struct Score {
  float surprisal;
  int32_t rank;
};

// By the definition, all logits in float64: for logits that float32 does not hold.
Score score_exactly(const float* hidden, const Matrix& codes, int64_t target) {
  std::vector<double> logits(codes.rows);
  double largest = -std::numeric_limits<double>::infinity();
  for (int64_t code = 0; code < codes.rows; ++code) {
    logits[code] = ZTOK_SELECT(token_logit)(hidden, codes, code);
    if (!std::isfinite(logits[code])) return {std::numeric_limits<float>::quiet_NaN(), -1};
    largest = std::max(largest, logits[code]);
  }
  double sum = 0;
  int64_t rank = 0;
  for (int64_t code = 0; code < codes.rows; ++code) {
    sum += std::exp(logits[code] - largest);
    rank += logits[code] > logits[target] || (logits[code] == logits[target] && code < target);
  }
  return {static_cast<float>((largest + std::log(sum) - logits[target]) * kBitsPerNat), static_cast<int32_t>(rank)};
}

Score score_of(const TokenRow& row, const float* hidden, const Matrix& codes) {
  if (row.target < 0) return {0, -1};
  if (!row.finite) return score_exactly(hidden, codes, row.target);
  // The target takes part with its exact logit: where it has most of the mass, its error would be the result's.
  const double exact = std::exp(row.target_logit - row.largest);
  const double sum = row.sum + exact - std::exp(static_cast<double>(row.target_rounded) - row.largest);
  const double nats = row.largest + std::log(std::max(sum, exact)) - row.target_logit;
  return {static_cast<float>(nats * kBitsPerNat), static_cast<int32_t>(row.greater)};
}

std::tuple<Tensor, Tensor> token_scores(const Tensor& hidden, const Tensor& rows, const Tensor& targets) {
  ZTOK_CHECK(hidden.dim() == 2, kOp, "hidden: expected [T, D], got ", hidden.dim(), " dimensions");
  ZTOK_CHECK(rows.dim() == 2 && rows.size(0) > 0 && rows.size(1) == hidden.size(1) && rows.size(1) > 0, kOp,
             "rows: expected [V, D] with the width of hidden and at least one row");
  ZTOK_CHECK(targets.dim() == 1 && targets.size(0) == hidden.size(0) && targets.scalar_type() == ScalarType::Long, kOp,
             "targets: expected int64 [T]");
  const int64_t total = hidden.size(0), width = hidden.size(1);
  Tensor surprisal = new_tensor(hidden, {total}, ScalarType::Float),
         rank = new_tensor(hidden, {total}, ScalarType::Int);
  const Tensor states = with_adjacent_elements(hidden), table = with_adjacent_elements(rows);
  const Tensor wanted = torch::stable::contiguous(targets);
  const Matrix matrix = matrix_of(kOp, "hidden", states), codes = matrix_of(kOp, "rows", table);
  const int64_t* target = wanted.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < total; ++i) {
    ZTOK_CHECK(target[i] >= -1 && target[i] < codes.rows, kOp, "targets: expected values in [-1, ", codes.rows,
               "), got ", target[i]);
  }
  auto* surprisals = surprisal.mutable_data_ptr<float>();
  auto* ranks = rank.mutable_data_ptr<int32_t>();
  // Blocks of equal size, whole register tiles each, at least one a thread.
  const double nanoseconds = static_cast<double>(total) * codes.rows * width / kProductsPerNanosecond;
  const int64_t tiles = (total + kTileRows - 1) / kTileRows, threads = std::min(threads_for(nanoseconds), tiles);
  const int64_t blocks = std::max(threads, (tiles + kBlockRows / kTileRows - 1) / (kBlockRows / kTileRows));
  const int64_t capacity = blocks == 0 ? 0 : (tiles + blocks - 1) / blocks * kTileRows;
  share_among(threads, blocks, 1, [&](int64_t, const auto& claims) {
    Buffer<float> floats(capacity * width), packed(capacity * width + 64), panels(kBlockCodes * width);
    Buffer<float> bias(kBlockCodes), scores(kTileRows * kBlockCodes);
    Buffer<int32_t> index(capacity);
    std::iota(index.get(), index.get() + capacity, 0);
    claims([&](int64_t block, int64_t) {
      const int64_t first = tiles * block / blocks * kTileRows;
      const int64_t count = std::min(tiles * (block + 1) / blocks * kTileRows, total) - first;
      ZTOK_SELECT(to_floats)(matrix, first, count, floats.get());
      ZTOK_SELECT(pack_tiles)(floats.get(), index.get(), count, width, nullptr, packed.get());
      std::vector<TokenRow> state(count);
      for (int64_t i = 0; i < count; ++i) {
        state[i].target = target[first + i];
        state[i].largest = -std::numeric_limits<float>::infinity();
        if (target[first + i] < 0) continue;
        state[i].target_logit = ZTOK_SELECT(token_logit)(floats.get() + i * width, codes, target[first + i]);
      }
      for (int64_t code = 0; code < codes.rows; code += kBlockCodes) {
        CodeBlock part{panels.get(), bias.get(), 0, code, std::min<int64_t>(kBlockCodes, codes.rows - code)};
        ZTOK_SELECT(pack_codes)(codes, Metric::dot, nullptr, nullptr, part);
        ZTOK_SELECT(score_block)(packed.get(), state.data(), count, width, part, scores.get());
      }
      for (int64_t i = 0; i < count; ++i) {
        const Score score = score_of(state[i], floats.get() + i * width, codes);
        surprisals[first + i] = score.surprisal;
        ranks[first + i] = score.rank;
      }
    });
  });
  return {surprisal, rank};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) { m.impl("token_scores", TORCH_BOX(&ztok::token_scores)); }
