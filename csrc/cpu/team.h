// Threads that go through the phases of one computation together, without a parallel region for each phase.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include <torch/csrc/stable/ops.h>

namespace ztok {

// The items of one phase: who takes which is left to chance, and the phase is over when all of them are done. A phase
// needs no thread in particular, so it ends even where fewer threads come than were asked for.
struct alignas(64) Phase {
  std::atomic<int64_t> next{0}, done{0};

  void reset() {
    next.store(0, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
  }
};

// One thread's way through the phases. Every member calls `share` with the same counts in the same order.
class Member {
 public:
  // null: a thread on its own
  explicit Member(Phase* phases = nullptr) : phase_(phases) {}

  // body(item) for every item in [0, count), by any member; returns when all of them are done.
  template <typename Body>
  void share(int64_t count, const Body& body) {
    if (phase_ == nullptr) {
      for (int64_t item = 0; item < count; ++item) body(item);
      return;
    }
    Phase& phase = *phase_++;
    int64_t mine = 0;
    for (int64_t item; (item = phase.next.fetch_add(1, std::memory_order_relaxed)) < count; ++mine) body(item);
    if (mine > 0) phase.done.fetch_add(mine, std::memory_order_release);
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();  // its core may be needed by the one that is waited for
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  Phase* phase_;
};

// work(member) on `threads` threads, which share `phases` (reset here).
template <typename Work>
void together(int64_t threads, Phase* phases, int64_t count, const Work& work) {
  for (int64_t i = 0; i < count; ++i) phases[i].reset();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Member member(phases);
    work(member);
  });
}

}  // namespace ztok
