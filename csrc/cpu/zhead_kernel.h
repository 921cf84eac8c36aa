// The inner parts of the Z head, one version per instruction set; zhead.cpp drives them.
#pragma once

#include "isa.h"
#include "philox.h"
#include "score_layout.h"

namespace ztok {

constexpr int kZCandidates = 16;
constexpr int32_t kZExact = -1;      // a candidate count: too large for float32, look at all codes in float64
constexpr int32_t kZNotFinite = -2;  // a candidate count: there is no answer

struct ZCandidate {
  int32_t code;
  float upper;  // its true score is not above this
  float logit;  // in float32
};

// One row and what is known of its best code so far.
struct ZRow {
  DrawKey key;
  float norm;   // length of the hidden row
  float lower;  // the best true score is at least this
  int32_t count;
  ZCandidate candidates[kZCandidates];
};

// sum of exp(logit - largest) over the codes of one block
struct ZMass {
  float largest, sum;
};

// What is asked: scores are logits at temperature 0, else logit / temperature + noise.
struct ZQuery {
  const float* hidden;  // [rows, width]
  int64_t rows;
  Matrix codes;
  double temperature;
};

// Rows of a query that share a pass over the codes; their scores with a block lie in L2.
constexpr int64_t kZRows = 48;

ZTOK_KERNEL(void, z_begin, const ZQuery& query, int64_t seed, const int64_t* row_ids, int64_t first_id, int64_t step,
            ZRow* rows)

// Looks at the codes of block `number`. masses[row * stride] gets the block's share of the row's normalisation;
// `scores` holds kZRows * kBlockCodes floats.
ZTOK_KERNEL(void, z_block, const ZQuery& query, int64_t number, ZRow* rows, ZMass* masses, int64_t stride,
            float* scores)

// The logit of a code, summed in float64 and rounded to float32 once.
ZTOK_KERNEL(float, z_logit, const float* hidden, const Matrix& codes, int64_t code)

}  // namespace ztok
