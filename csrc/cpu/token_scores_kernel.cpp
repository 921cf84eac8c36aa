// Logits are made tile by tile, used and forgotten: a block of 128 codes at a time, each row's largest logit, the sum
// of exponentials and the rank of its target are brought up to date.
#include "token_scores_kernel.h"

#include "exact_score.h"
#include "exponentials.h"
#include "score_tile.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

void update(TokenRow& row, const float* logits, int64_t first, int64_t count) {
  float largest = logits[0], checked = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = logits[i] > largest ? logits[i] : largest;
    checked += logits[i] * 0;  // NaN for what is not finite
  }
  if (checked != 0 || !(row.largest >= -__builtin_inff())) {
    row.finite = false;
    return;
  }
  const float target = static_cast<float>(row.target_logit);
  int64_t greater = 0;
  for (int64_t i = 0; i < count; ++i) greater += logits[i] > target;
  const int64_t before = row.target - first < count ? row.target - first : count;
  for (int64_t i = 0; i < before; ++i) greater += logits[i] == target;
  if (row.target >= first && row.target < first + count) {
    row.target_rounded = logits[row.target - first];
    greater -= row.target_rounded > target;
  }
  row.greater += greater;
  const double sum = sum_of_exponentials(logits, count, largest);
  if (largest > row.largest) {
    row.sum = row.sum * __builtin_exp(static_cast<double>(row.largest) - largest) + sum;
    row.largest = largest;
  } else {
    row.sum += sum * __builtin_exp(static_cast<double>(largest) - row.largest);
  }
}

}  // namespace

void score_block(const float* tiles, TokenRow* rows, int64_t count, int64_t width, const CodeBlock& block,
                 float* scores) {
  const int64_t num_tiles = (count + kTileRows - 1) / kTileRows, num_panels = panels_of(block.count);
  const int64_t part = part_depth(width);
  for (int64_t t = 0; t < num_tiles; ++t) {
    for (int64_t p = 0; p < num_panels; ++p) {
      Tile tile;
      start(block.bias + p * kPanel, tile);
      for (int64_t first = 0; first < width; first += part) {
        const int64_t depth = smaller(part, width - first);
        accumulate(tiles + first * num_tiles * kTileRows + t * depth * kTileRows,
                   block.panels + first * num_panels * kPanel + p * depth * kPanel, depth, tile);
      }
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        store(scores + r * kBlockCodes + p * kPanel, tile[r][0]);
        store(scores + r * kBlockCodes + p * kPanel + kWidth, tile[r][1]);
      }
    }
    for (int64_t r = 0; r < kTileRows && t * kTileRows + r < count; ++r) {
      TokenRow& row = rows[t * kTileRows + r];
      if (row.target >= 0 && row.finite) update(row, scores + r * kBlockCodes, block.first, block.count);
    }
  }
}

double token_logit(const float* hidden, const Matrix& codes, int64_t code) { return exact_dot(hidden, codes, code); }

}  // namespace ZTOK_ISA
}  // namespace ztok
