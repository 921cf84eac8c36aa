// How fast one variant of the int8 products is on one thread; int8_rates.py compiles and runs it.
#include ZTOK_SOURCE

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

namespace {

// Least nanoseconds of a call, of as many as fit into a quarter of a second.
template <typename Call>
double nanoseconds(const Call& call) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double, std::nano>(Clock::now() - start).count();
  };
  double least = 1e18;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    call();
    least = std::min(least, since(start));
  } while (since(begin) < 0.25e9);
  return least;
}

#ifdef __AVX512VNNI__
void peak() {
  const __m512i ones = _mm512_set1_epi8(1);
  constexpr int kTurns = 100000;
#define DOT(i) "vpdpbusd %12, %12, %" #i "\n\t"
  const double time = nanoseconds([=] {
    __m512i s[12] = {};
    for (int turn = 0; turn < kTurns; ++turn) {
      asm volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11)
                   : "+v"(s[0]), "+v"(s[1]), "+v"(s[2]), "+v"(s[3]), "+v"(s[4]), "+v"(s[5]), "+v"(s[6]), "+v"(s[7]),
                     "+v"(s[8]), "+v"(s[9]), "+v"(s[10]), "+v"(s[11])
                   : "v"(ones));
    }
  });
  std::printf("vpdpbusd alone %.0f\n", 12.0 * 128 * kTurns / time);
}
#endif

// Sums of all bytes, to know how fast memory can be read.
void read(const std::vector<uint8_t>& memory) {
  volatile uint64_t kept = 0;
  const auto* words = reinterpret_cast<const uint64_t*>(memory.data());
  const double time = nanoseconds([&] {
    uint64_t sums[32] = {};
    for (size_t i = 0; i + 32 <= memory.size() / 8; i += 32) {
      for (int lane = 0; lane < 32; ++lane) sums[lane] += words[i + lane];
    }
    for (uint64_t sum : sums) kept = kept + sum;
  });
  std::printf("memory read at %.1f GB/s\n", memory.size() / time);
}

}  // namespace

int main() {
#ifdef __AVX512VNNI__
  peak();
#endif
  const std::vector<uint8_t> memory(256000000, 9);
  read(memory);
  for (const auto [depth, columns] : {std::pair{256, 768}, {768, 256}, {576, 1536}, {1536, 576}}) {
    std::printf("%4d x %4d:", depth, columns);
    for (int rows : {1, 4, 12, 128}) {
      const std::vector<int8_t> x(rows * depth, 3);
      const std::vector<int32_t> row_sums(rows, 3 * depth);
      std::vector<int32_t> sums(rows * columns);
      const auto products = [&](const uint8_t* panels) {
        ztok::ZTOK_VARIANT()(x.data(), depth, rows, row_sums.data(), panels, depth, columns / 16, sums.data(), columns);
      };
      const double time = nanoseconds([&] { products(memory.data()); });
      std::printf("  %d: %4.0f", rows, 2.0 * rows * depth * columns / time);
      if (rows == 1) {
        const size_t size = depth * columns, copies = memory.size() / size;
        const double all = nanoseconds([&] {
          for (size_t copy = 0; copy < copies; ++copy) products(memory.data() + copy * size);
        });
        std::printf("  1, weights from memory: %.0f = %.1f GB/s", 2.0 * copies * size / all, copies * size / all);
      }
    }
    std::printf("\n");
  }
}
