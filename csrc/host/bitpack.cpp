#include "bitpack.h"

namespace ztok {

size_t first_too_wide(const uint32_t* codes, size_t count, int bits) {
  if (bits >= kMaxBits) return count;
  for (size_t i = 0; i < count; ++i) {
    if (codes[i] >> bits != 0) return i;
  }
  return count;
}

void pack(const uint32_t* codes, size_t count, int bits, uint8_t* packed) {
  uint64_t pending = 0;  // at most 7 + 32 bits are waiting at any time
  int waiting = 0;
  for (size_t i = 0; i < count; ++i) {
    pending |= static_cast<uint64_t>(codes[i]) << waiting;
    for (waiting += bits; waiting >= 8; waiting -= 8, pending >>= 8) *packed++ = static_cast<uint8_t>(pending);
  }
  if (waiting > 0) *packed = static_cast<uint8_t>(pending);
}

void unpack(const uint8_t* packed, size_t count, int bits, int64_t* codes) {
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  uint64_t pending = 0;
  int waiting = 0;
  for (size_t i = 0; i < count; ++i) {
    for (; waiting < bits; waiting += 8) pending |= static_cast<uint64_t>(*packed++) << waiting;
    codes[i] = static_cast<int64_t>(pending & mask);
    pending >>= bits;
    waiting -= bits;
  }
}

}  // namespace ztok
