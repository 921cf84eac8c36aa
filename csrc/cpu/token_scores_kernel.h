// The inner part of token_scores, one version per instruction set; token_scores.cpp drives it.
#pragma once

#include "isa.h"
#include "score_layout.h"

namespace ztok {

// One row and what is known of its logits so far.
struct TokenRow {
  int64_t target;
  double target_logit;       // exact
  float target_rounded = 0;  // the same as the blocks have it
  float largest;             // of all logits
  double sum = 0;            // of exp(logit - largest)
  int64_t greater = 0;       // codes before the target in the order of logits
  bool finite = true;
};

// Rows packed by pack_tiles against the codes of one packed block. `scores` holds kTileRows * kBlockCodes floats.
ZTOK_KERNEL(void, score_block, const float* tiles, TokenRow* rows, int64_t count, int64_t width, const CodeBlock& block,
            float* scores)

// The logit of a code in float64.
ZTOK_KERNEL(double, token_logit, const float* hidden, const Matrix& codes, int64_t code)

}  // namespace ztok
