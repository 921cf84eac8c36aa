// The counter-based generator of the Z head: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011), laid out as in
// ztok_fast/ops/zhead/reference.py. Functions of internal linkage, for kernel files too.
#pragma once

#include <cstdint>

namespace ztok {

// What identifies the draws of one row at one step.
struct DrawKey {
  uint32_t seed_low, seed_high, row_low, row_high, step;
};

static inline DrawKey draw_key(int64_t seed, int64_t row_id, int64_t step) {
  const auto s = static_cast<uint64_t>(seed), r = static_cast<uint64_t>(row_id);
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(r),
          static_cast<uint32_t>(r >> 32), static_cast<uint32_t>(step)};
}

// words[4 * i + w] is word w of the counter (first_block + i, row, step): that of code 4 * (first_block + i) + w.
template <int kBlocks>
static inline void draw_words(const DrawKey& key, uint32_t first_block, uint32_t* words) {
  uint32_t a[kBlocks], b[kBlocks], c[kBlocks], d[kBlocks];
  for (int i = 0; i < kBlocks; ++i) {
    a[i] = first_block + static_cast<uint32_t>(i);
    b[i] = key.row_low;
    c[i] = key.row_high;
    d[i] = key.step;
  }
  uint32_t k0 = key.seed_low, k1 = key.seed_high;
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * a[i];
      const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * c[i];
      const uint32_t next_a = static_cast<uint32_t>(second >> 32) ^ b[i] ^ k0;
      const uint32_t next_c = static_cast<uint32_t>(first >> 32) ^ d[i] ^ k1;
      b[i] = static_cast<uint32_t>(second);
      d[i] = static_cast<uint32_t>(first);
      a[i] = next_a;
      c[i] = next_c;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kBlocks; ++i) {
    words[4 * i] = a[i];
    words[4 * i + 1] = b[i];
    words[4 * i + 2] = c[i];
    words[4 * i + 3] = d[i];
  }
}

// Standard Gumbel noise from a word; see the reference for why this way round.
static inline double gumbel_of(uint32_t word) {
  return -__builtin_log(-__builtin_log1p(-((static_cast<double>(word) + 0.5) * 0x1p-32)));
}

}  // namespace ztok
