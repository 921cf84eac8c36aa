// Which rows of a call of the engine go through the layers together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ztok {

// Consecutive rows of one sequence in a pass.
struct Piece {
  int64_t first, count;  // rows of the call
  int64_t start;         // of the first one, in the cache
  int64_t slot;
};

struct Pass {
  int64_t adapter, rows, pieces_begin, pieces_end;
};

// Kept by each thread for its next call.
struct Plan {
  std::vector<int64_t> order;
  std::vector<Piece> pieces;
  std::vector<Pass> passes;
  std::vector<int64_t> starts;  // passes at which a run of dependent ones starts, and the end
};

// Rows of each adapter in passes of at most `limit`. A sequence that does not fit what is left of a pass starts another
// one where passes are to be `separate`: then only those of one long sequence depend on each other.
inline void make_passes(Plan& plan, const int32_t* cu_rows, const int32_t* slots, const int32_t* starts,
                        const int32_t* adapters, int64_t limit, bool separate) {
  plan.pieces.clear();
  plan.passes.clear();
  plan.starts.clear();
  int64_t room = 0;  // of the last pass
  for (const int64_t s : plan.order) {
    const int64_t count = cu_rows[s + 1] - cu_rows[s];
    if (!plan.passes.empty() && plan.passes.back().adapter != adapters[s]) room = 0;
    if (separate && count > room) room = 0;
    for (int64_t done = 0; done < count;) {
      if (room == 0) {
        const auto pieces = static_cast<int64_t>(plan.pieces.size());
        if (done == 0) plan.starts.push_back(static_cast<int64_t>(plan.passes.size()));
        plan.passes.push_back({adapters[s], 0, pieces, pieces});
        room = limit;
      }
      Pass& pass = plan.passes.back();
      const int64_t taken = std::min(room, count - done);
      plan.pieces.push_back({cu_rows[s] + done, taken, starts[s] + done, slots[s]});
      pass.rows += taken;
      pass.pieces_end += 1;
      done += taken;
      room -= taken;
    }
    if (separate && count > limit) room = 0;
  }
  plan.starts.push_back(static_cast<int64_t>(plan.passes.size()));
}

}  // namespace ztok
