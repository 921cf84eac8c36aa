// The sampling rule of docs/determinism.md over integer weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "philox.h"

namespace ztok {

// The 64 random bits of a draw.
inline uint64_t random_bits(int64_t seed, int64_t row_id, int64_t step) {
  uint32_t words[4];
  draw_words<1>(draw_key(seed, row_id, step), 0, words);
  return words[0] | static_cast<uint64_t>(words[1]) << 32;
}

// A token that may be drawn; the order of the sampling rule.
struct Candidate {
  int64_t weight;
  int32_t token;

  bool operator<(const Candidate& other) const {  // a heap has the greatest first
    return weight != other.weight ? weight < other.weight : token > other.token;
  }
};

inline int64_t draw(const int64_t* weights, int64_t count, double top_p, uint64_t random,
                    std::vector<Candidate>& heap) {
  heap.clear();
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += weights[i];
    if (weights[i] > 0) heap.push_back({weights[i], static_cast<int32_t>(i)});
  }
  std::make_heap(heap.begin(), heap.end());
  // The kept prefix ends up at the back, in rising order of weight. All tokens are kept without sorting them.
  auto end = heap.end();
  int64_t kept = top_p == 1 ? total : 0;
  while (end != heap.begin() && (kept == 0 || static_cast<double>(kept) < top_p * static_cast<double>(total))) {
    std::pop_heap(heap.begin(), end--);
    kept += end->weight;
  }
  const auto place = static_cast<int64_t>(static_cast<unsigned __int128>(random) * static_cast<uint64_t>(kept) >> 64);
  int64_t sum = 0;
  for (auto it = heap.end(); it != heap.begin();) {
    if (it == end) std::pop_heap(heap.begin(), end--);
    --it;
    sum += it->weight;
    if (sum > place) return it->token;
  }
  return -1;  // not reached: sum ends at kept, which is above place
}

}  // namespace ztok
