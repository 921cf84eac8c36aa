// The Z head in float32 with a rigorous bound on its error, as in nearest_kernel.cpp: only codes whose score can be the
// best are looked at closer. When sampling, the noise of a code is first bounded from above by a linear piece of the
// logarithm; the two logarithms of the true noise are taken only where that bound reaches the best score.
#include "zhead_kernel.h"

#include "bounds.h"
#include "dot_tile.h"
#include "exact_score.h"
#include "exponentials.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

constexpr float kLeast = 0x1p-126f, kLargest = 0x1p100f;
constexpr float kMostNoise = 32;  // |noise| is below 23

uint32_t word_of(const DrawKey& key, int64_t code) {
  uint32_t words[4];
  draw_words<1>(key, static_cast<uint32_t>(code / 4), words);
  return words[code % 4];
}

double exact(const ZQuery& query, const ZRow& row, const float* hidden, int64_t code) {
  const double logit = z_logit(hidden, query.codes, code);
  return query.temperature == 0 ? logit : logit / query.temperature + gumbel_of(word_of(row.key, code));
}

// As `prune` of nearest_kernel.cpp.
__attribute__((noinline)) void prune(const ZQuery& query, ZRow& row, const float* hidden) {
  int kept = 0;
  for (int i = 0; i < row.count; ++i) {
    if (row.candidates[i].upper >= row.lower) row.candidates[kept++] = row.candidates[i];
  }
  if (kept > kZCandidates / 2) {
    int best = 0;
    double most = exact(query, row, hidden, row.candidates[0].code);
    for (int i = 1; i < kept; ++i) {
      const double score = exact(query, row, hidden, row.candidates[i].code);
      if (score > most) most = score, best = i;
    }
    row.candidates[0] = row.candidates[best];
    kept = 1;
  }
  row.count = kept;
}

// Upper bounds of the noise, from log2(1 + m) >= m: the bits of a float are its logarithm with straight lines for arcs.
void bound_noise(const uint32_t* words, float* bounds) {
  for (int i = 0; i < kBlockCodes; ++i) {
    const float half = static_cast<float>(static_cast<int32_t>(words[i] >> 1)) + 0.25f;  // at most (word + 1/2) / 2
    int32_t bits;
    __builtin_memcpy(&bits, &half, 4);
    // -log(-log1p(-w)) <= -log(w); 1e-4 covers the roundings here
    bounds[i] = (31.0f + 127.0f - static_cast<float>(bits) * 0x1p-23f) * 0.693147181f + 1e-4f;
  }
}

// Looks at the logits of one block for one row. A float32 score is within `error_bound` of the true one.
void look(const ZQuery& query, ZRow& row, const float* hidden, const float* logits, int64_t first, int64_t count,
          float inverse, float error_bound) {
  alignas(64) uint32_t words[kBlockCodes];
  alignas(64) float bounds[kBlockCodes];
  const bool sampled = query.temperature != 0;
  if (sampled) {
    draw_words<kBlockCodes / 4>(row.key, static_cast<uint32_t>(first / 4), words);
    bound_noise(words, bounds);
    for (int i = 0; i < kBlockCodes; ++i) bounds[i] = logits[i] * inverse + bounds[i];
  } else {
    __builtin_memcpy(bounds, logits, sizeof bounds);
  }
  for (int64_t i = 0; i < count; i += kWidth) {
    uint32_t passed = bits(load(bounds + i) >= broadcast(row.lower - error_bound));
    for (; passed != 0; passed &= passed - 1) {
      const int64_t j = i + __builtin_ctz(passed);
      if (j >= count) break;
      float score = logits[j] * inverse;
      if (sampled) score += static_cast<float>(gumbel_of(words[j]));
      if (score - error_bound > row.lower) row.lower = score - error_bound;
      if (score + error_bound < row.lower) continue;
      if (row.count == kZCandidates) prune(query, row, hidden);
      row.candidates[row.count++] = {static_cast<int32_t>(first + j), score + error_bound, logits[j]};
    }
  }
}

template <typename T>
void block_of(const ZQuery& query, const T* codes, int64_t first, ZRow* rows, ZMass* masses, int64_t stride,
              float* scores) {
  const int64_t width = query.codes.width, count = smaller(kBlockCodes, query.codes.rows - first);
  alignas(64) float squares[kBlockCodes];
  dot_block<false>(query.hidden, query.rows, codes + first * query.codes.stride, query.codes.stride, count, width,
                   nullptr, scores, squares);
  const float longest = longest_of(squares, count, width);
  const float n = static_cast<float>(width), inverse = query.temperature == 0 ? 1.0f : 1.0f / query.temperature;
  for (int64_t r = 0; r < query.rows; ++r) {
    ZRow& row = rows[r];
    if (row.count < 0) continue;
    const float size = row.norm * longest;
    if (!(size < kLargest && size * inverse < kLargest && inverse < kLargest)) {
      row.count = kZExact;
      continue;
    }
    float* logits = scores + r * kBlockCodes;
    for (int64_t i = count; i < kBlockCodes; ++i) logits[i] = logits[0];
    float largest = logits[0];
    for (int64_t i = 1; i < count; ++i) largest = logits[i] > largest ? logits[i] : largest;
    masses[r * stride] = {largest, sum_of_exponentials(logits, count, largest)};
    // As in nearest_kernel.cpp; the 32 also hold apart what may become equal when the logits are rounded to float32.
    const float rounding = 1.01f * kUnit * (2 * n + 32) * size + kLeast * (2 * n + 32) * (1 + row.norm + longest);
    const float error_bound = (rounding + 8 * kUnit * size) * inverse + 8 * kUnit * kMostNoise;
    look(query, row, query.hidden + r * width, logits, first, count, inverse,
         query.temperature == 0 ? rounding : error_bound);
  }
}

}  // namespace

void z_begin(const ZQuery& query, int64_t seed, const int64_t* row_ids, int64_t first_id, int64_t step, ZRow* rows) {
  for (int64_t r = 0; r < query.rows; ++r) {
    const double square = squared_norm(query.hidden + r * query.codes.width, query.codes.width);
    const bool finite = square < __builtin_inf(), small = square < static_cast<double>(kLargest) * kLargest;
    rows[r].key = draw_key(seed, row_ids ? row_ids[r] : first_id + r, step);
    rows[r].norm = small ? static_cast<float>(__builtin_sqrt(square) * (1 + 4 * kUnit)) : 0;
    rows[r].lower = -__builtin_inff();
    rows[r].count = !finite ? kZNotFinite : small ? 0 : kZExact;
  }
}

void z_block(const ZQuery& query, int64_t number, ZRow* rows, ZMass* masses, int64_t stride, float* scores) {
  const int64_t first = number * kBlockCodes;
  switch (query.codes.element) {
    case Element::float16:
      return block_of(query, static_cast<const Half*>(query.codes.data), first, rows, masses, stride, scores);
    case Element::bfloat16:
      return block_of(query, static_cast<const BFloat16*>(query.codes.data), first, rows, masses, stride, scores);
    default:
      return block_of(query, static_cast<const float*>(query.codes.data), first, rows, masses, stride, scores);
  }
}

float z_logit(const float* hidden, const Matrix& codes, int64_t code) {
  return static_cast<float>(exact_dot(hidden, codes, code));
}

}  // namespace ZTOK_ISA
}  // namespace ztok
