// Work among the threads of torch's pool, and memory for each.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include <torch/csrc/stable/ops.h>

namespace ztok {

// Memory of one thread, kept for its next call.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      size_ = floats;
      memory_.reset(new float[floats + kAlignment]);
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (kAlignment * 4 - address % (kAlignment * 4)) / 4 % kAlignment;
  }

 private:
  static constexpr int64_t kAlignment = 16;  // floats
  int64_t size_ = 0;
  std::unique_ptr<float[]> memory_;
};

constexpr double kNanosecondsPerThread = 50e3;  // what waking a sleeping one costs

// What one core does in a nanosecond, with data in its caches, to say how many threads are worth waking; nothing else
// depends on it.
constexpr double kProductsPerNanosecond = 40, kBytesPerNanosecond = 50;

// Threads worth waking for so much work, at least one.
inline int64_t threads_for(double nanoseconds) {
  const auto worth = static_cast<int64_t>(std::clamp(nanoseconds / kNanosecondsPerThread, 1.0, 1e6));
  return std::min<int64_t>(torch::stable::get_num_threads(), worth);
}

// Calls worker(thread, claims) once on each of `threads` threads; claims(body) calls body(begin, end) until all of
// [0, count) is done. Threads take at most `step` of them at a time from a shared counter, fewer towards the end: one
// that was asleep or shares its core holds nobody up. Which thread does what is left to chance; no result depends on
// it.
template <typename Worker>
void share_among(int64_t threads, int64_t count, int64_t step, const Worker& worker) {
  std::atomic<int64_t> next{0};
  const auto claims = [&](const auto& body) {
    for (int64_t begin = next.load(); begin < count;) {
      const int64_t end = begin + std::clamp<int64_t>((count - begin) / (2 * threads), 1, step);
      if (next.compare_exchange_weak(begin, end)) {
        body(begin, end);
        begin = next.load();
      }
    }
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) worker(thread, claims);
  });
}

// The same for bodies that need nothing of their thread, on as many threads as `nanoseconds` of work are worth.
template <typename Body>
void share(int64_t count, int64_t step, double nanoseconds, const Body& body) {
  const int64_t threads = std::min(threads_for(nanoseconds), count);
  if (threads <= 1) {
    body(0, count);
    return;
  }
  share_among(threads, count, step, [&](int64_t, const auto& claims) { claims(body); });
}

}  // namespace ztok
