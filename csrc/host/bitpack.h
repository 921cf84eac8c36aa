// Integer codes of a fixed width, packed without gaps: code i fills bits [i·n, (i + 1)·n) of the stream, least
// significant bit first, bit k of the stream being bit k % 8 of byte k / 8. Unused bits of the last byte are zero.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ztok {

constexpr int kMaxBits = 32;

inline size_t packed_size(size_t count, int bits) { return (count / 8) * bits + ((count % 8) * bits + 7) / 8; }

// Index of the first code that does not fit into `bits`, or `count` when all do.
size_t first_too_wide(const uint32_t* codes, size_t count, int bits);

// `packed` holds packed_size(count, bits) bytes; every one of them is written.
void pack(const uint32_t* codes, size_t count, int bits, uint8_t* packed);

// Reads packed_size(count, bits) bytes, no more.
void unpack(const uint8_t* packed, size_t count, int bits, int64_t* codes);

}  // namespace ztok
