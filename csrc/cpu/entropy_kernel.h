// Counts of tokens from logits, one version per instruction set with the same integers in all; entropy.cpp drives them.
// The count of a token is 1 + rint(exp(logit - largest) * 2^30), with the exp of docs/determinism.md.
#pragma once

#include "isa.h"

namespace ztok {

// A symbol: its counts lie in [start, start + size) of `total`.
struct Interval {
  uint64_t start, size, total;
};

constexpr int64_t kMostTokens = 500000;  // their total stays below 2^49
constexpr int64_t kStretches = 256;

// What decoding keeps of a row of logits: the sums of its counts, stretch by stretch.
struct RowCounts {
  float largest;
  int64_t length;  // of a stretch
  uint64_t total;
  uint64_t sums[kStretches];
};

// The interval of a token. False if a logit is not finite.
ZTOK_KERNEL(bool, token_interval, const float* logits, int64_t count, int64_t token, Interval* interval)

// False if a logit is not finite.
ZTOK_KERNEL(bool, count_row, const float* logits, int64_t count, RowCounts* row)

// The token whose interval contains `value`, which is below row.total.
ZTOK_KERNEL(int64_t, find_token, const float* logits, int64_t count, const RowCounts& row, uint64_t value,
            Interval* interval)

}  // namespace ztok
