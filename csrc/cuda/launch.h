// Choosing how wide the units are that a kernel moves, and how many blocks move them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ztok {

// Grids are at most this large; the kernels' loops reach the rest.
inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  const int64_t blocks = (items + items_per_block - 1) / items_per_block;
  return static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(blocks, 1), 1 << 30));
}

// Collects every address, stride and length in bytes that a kernel will form; the widest unit divides them all.
struct Alignment {
  uint64_t bits = 0;

  Alignment& address(const void* pointer) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
    return *this;
  }
  Alignment& bytes(int64_t count) {
    bits |= static_cast<uint64_t>(count);
    return *this;
  }

  // Calls f(Unit{}) with the widest of uint4, uint2, uint32_t, uint16_t and uint8_t.
  template <typename F>
  void with_unit(const F& f) const {
    if (bits % 16 == 0) return f(uint4{});
    if (bits % 8 == 0) return f(uint2{});
    if (bits % 4 == 0) return f(uint32_t{});
    if (bits % 2 == 0) return f(uint16_t{});
    f(uint8_t{});
  }
};

}  // namespace ztok
