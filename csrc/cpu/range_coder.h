// The range coder of ztok_fast/ops/entropy (Martin, 1979): bytes, a 64-bit interval, carries into the bytes already
// written. A stream is a number in [0, 1), its bytes the digits after the point; digits that are left out are 0.
#pragma once

#include "entropy_kernel.h"

namespace ztok {

// The least `range` between two symbols. A total is below 2^49, so a share of the range is at least 2^7 wide and a
// symbol writes at most seven bytes.
constexpr uint64_t kLeastRange = uint64_t{1} << 56, kTotalLimit = uint64_t{1} << 49;
constexpr int64_t kBytesPerSymbol = 7, kBytesAtEnd = 8;

class RangeEncoder {
 public:
  explicit RangeEncoder(uint8_t* begin) : begin_(begin), end_(begin) {}

  void encode(const Interval& interval) {
    const uint64_t share = range_ / interval.total;
    add(share * interval.start);
    range_ = share * interval.size;
    for (; range_ < kLeastRange; range_ <<= 8, low_ <<= 8) *end_++ = static_cast<uint8_t>(low_ >> 56);
  }

  // Writes the fewest digits of a number in the interval, and returns the end of the stream.
  uint8_t* finish() {
    for (int digits = 0; digits <= 8; ++digits) {
      // how far it is from low_ to the next number that has only so many digits
      const uint64_t mask = digits == 0 ? ~uint64_t{0} : digits == 8 ? 0 : (uint64_t{1} << (64 - 8 * digits)) - 1;
      const uint64_t distance = (~low_ + 1) & mask;
      if (distance >= range_) continue;
      add(distance);
      for (int i = 0; i < digits; ++i, low_ <<= 8) *end_++ = static_cast<uint8_t>(low_ >> 56);
      break;
    }
    while (end_ > begin_ && end_[-1] == 0) --end_;
    return end_;
  }

 private:
  void add(uint64_t amount) {
    low_ += amount;
    if (low_ >= amount) return;
    // The number stays below 1, so a carry never leaves the stream.
    for (uint8_t* digit = end_; digit > begin_ && ++*--digit == 0;) {
    }
  }

  uint8_t *begin_, *end_;
  uint64_t low_ = 0, range_ = ~uint64_t{0};
};

// A row of the decoder's state tensor. Nothing in it is trusted but `range`, which the caller has checked.
struct RangeDecoder {
  uint64_t range, value;  // value: of the number, less the interval's lower end
  int64_t position, end;  // of the next digit, and of the stream

  // Which of `total` counts comes next; one of them whatever the digits are.
  uint64_t peek(uint64_t total) const {
    const uint64_t count = value / (range / total);
    return count < total ? count : total - 1;
  }

  void consume(const Interval& interval, const uint8_t* data, int64_t size) {
    const uint64_t share = range / interval.total;
    value -= share * interval.start;
    range = share * interval.size;
    for (; range < kLeastRange; range <<= 8) value = value << 8 | next(data, size);
  }

 private:
  uint64_t next(const uint8_t* data, int64_t size) {
    if (position < 0 || position >= end || position >= size) return 0;
    return data[position++];
  }
};

}  // namespace ztok
