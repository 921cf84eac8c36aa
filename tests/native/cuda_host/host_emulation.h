// Runs CUDA kernels on the host, block after block, every thread of a block a fiber of its own. What the kernels take
// from csrc/cuda/device.cuh (barriers, shuffles, tensor-core products) is plain C++ here; they are compiled as they
// are. Fibers are resumed in an order drawn from a seed, so that a missing barrier shows; memory ordering between
// blocks does not.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <vector>

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cuda_runtime.h>

#undef __global__
#undef __shared__
#undef __device__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block runs at a time, so memory shared by its threads can be static. It keeps what the block before left in it.
#define __shared__ static

namespace ztok::host {

struct Barrier {
  int size = 0, arrived = 0;
  std::vector<int> waiting;
};

// A context starts a fiber on its own stack; after that jumps switch, which unlike swapcontext make no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  std::unique_ptr<char[]> stack;
  dim3 thread;
};

// Dynamic shared memory of a block: its end abuts a page without access.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : size_((bytes + kPage - 1) / kPage * kPage) {
    void* memory = mmap(nullptr, size_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<char*>(memory);
    mprotect(pages_ + size_, kPage, PROT_NONE);
    begin_ = reinterpret_cast<float*>(pages_ + size_ - bytes);
    end_ = reinterpret_cast<float*>(pages_ + size_);
  }
  ~SharedMemory() { munmap(pages_, size_ + kPage); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void fill(float v) { std::fill(begin_, end_, v); }
  float* data() const { return begin_; }

 private:
  static constexpr size_t kPage = 4096;
  size_t size_;
  char* pages_;
  float *begin_, *end_;
};

constexpr size_t kStackBytes = 128 * 1024;

struct Block {
  dim3 grid, block, index;
  std::vector<Fiber> fibers;
  std::vector<int> ready;
  std::mt19937 order;
  jmp_buf scheduler;
  int current = 0, running = 0;
  bool misaligned = false;  // an exception could not leave its fiber
  Barrier all;
  std::vector<Barrier> warps;
  SharedMemory shared;
  // Operands that the lanes of each warp hand in for a collective.
  struct Lane {
    float value;
    float* c;
    uint32_t a[4], b[2];
  };
  std::vector<std::array<Lane, 32>> lanes;

  explicit Block(size_t shared_bytes) : shared(shared_bytes) {}
};

inline Block* block = nullptr;

inline void wait(Barrier& barrier) {
  Block& b = *block;
  const int self = b.current;
  if (++barrier.arrived < barrier.size) {
    barrier.waiting.push_back(self);
    if (_setjmp(b.fibers[self].jump) == 0) _longjmp(b.scheduler, 1);
    return;
  }
  barrier.arrived = 0;
  b.ready.insert(b.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

// Runs a fiber until it waits or ends. Not inlined: a jump may come back to this frame only while it exists.
__attribute__((noinline)) inline void resume(Block& b, Fiber& fiber) {
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

template <typename Kernel>
void run_block(Block& b, const Kernel& kernel) {
  static const Kernel* body;  // one block at a time
  body = &kernel;
  block = &b;
  const int threads = b.block.x;
  b.running = threads;
  b.all = {threads, 0, {}};
  b.warps.assign(threads / 32, Barrier{32, 0, {}});
  b.lanes.resize(threads / 32);
  b.fibers.resize(threads);
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = b.fibers[t];
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.thread = dim3(t);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.started = false;
    makecontext(
        &fiber.context,
        +[] {
          (*body)();
          --block->running;
          _longjmp(block->scheduler, 1);
        },
        0);
    b.ready.push_back(t);
  }
  while (!b.ready.empty()) {
    std::swap(b.ready[b.order() % b.ready.size()], b.ready.back());
    b.current = b.ready.back();
    b.ready.pop_back();
    resume(b, b.fibers[b.current]);
  }
  if (b.running != 0) throw std::runtime_error("threads wait at a barrier that others never reach");
  if (b.misaligned) throw std::runtime_error("a 16-byte load that is not aligned");
}

// Every block of the grid, in an order drawn from the seed. Shared memory begins as NaN.
template <typename Kernel>
void launch(dim3 grid, dim3 threads, size_t shared_bytes, uint32_t seed, const Kernel& kernel) {
  Block b(shared_bytes);
  b.grid = grid;
  b.block = threads;
  b.order.seed(seed);
  std::vector<dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y);
  }
  std::shuffle(blocks.begin(), blocks.end(), b.order);
  for (const dim3& index : blocks) {
    b.index = index;
    b.shared.fill(__builtin_nanf(""));
    run_block(b, kernel);
  }
}

inline int warp() { return block->current / 32; }
inline int lane() { return block->current % 32; }

}  // namespace ztok::host

#define threadIdx (ztok::host::block->fibers[ztok::host::block->current].thread)
#define blockIdx (ztok::host::block->index)
#define blockDim (ztok::host::block->block)
#define gridDim (ztok::host::block->grid)

inline void __syncthreads() { ztok::host::wait(ztok::host::block->all); }
inline void __threadfence() {}
inline int32_t atomicAdd(int32_t* address, int32_t value) {
  const int32_t before = *address;
  *address += value;
  return before;
}

namespace ztok {

inline float* shared_floats() { return host::block->shared.data(); }
inline uint4 load_streaming(const void* address) {
  host::block->misaligned |= reinterpret_cast<uintptr_t>(address) % 16 != 0;
  uint4 v;
  std::memcpy(&v, address, 16);
  return v;
}
inline uint4 load_cached(const void* address) { return load_streaming(address); }
inline float load_shared_between_blocks(const float* address) { return *address; }
inline void prefetch_to_l2(const void*) {}
inline void let_next_kernel_begin() {}
inline void wait_for_kernel_before() {}

inline float shuffle_xor(float value, int lanes) {
  auto& slots = host::block->lanes[host::warp()];
  host::Barrier& barrier = host::block->warps[host::warp()];
  slots[host::lane()].value = value;
  host::wait(barrier);
  const float result = slots[host::lane() ^ lanes].value;
  host::wait(barrier);  // nobody hands in the next value before all have taken this one
  return result;
}

float to_float(__half v);
float to_float(__nv_bfloat16 v);

// Fragments of mma.m16n8k16 as the PTX manual defines them; products exact, sums in float32.
template <typename T>
void mma_16x8x16(T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& slots = host::block->lanes[host::warp()];
  host::Barrier& barrier = host::block->warps[host::warp()];
  auto& own = slots[host::lane()];
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  host::wait(barrier);
  const auto element = [](uint32_t word, int i) {
    const uint16_t bits = static_cast<uint16_t>(word >> (16 * i));
    T v;
    std::memcpy(static_cast<void*>(&v), &bits, 2);
    return to_float(v);
  };
  const int group = host::lane() / 4, quad = host::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + 8 * (i / 2), column = 2 * quad + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      const float left = element(slots[4 * (row % 8) + holder].a[row / 8 + k / 8 * 2], k % 2);
      const float right = element(slots[4 * column + holder].b[k / 8], k % 2);
      c[i] += left * right;
    }
  }
  host::wait(barrier);
}

}  // namespace ztok
