// What the ops of ztok_fast/ops/entropy share: checked offsets, and the states of many decoders.
#pragma once

#include "range_coder.h"
#include "share.h"
#include "tensors.h"

namespace ztok {

constexpr double kSymbolsPerNanosecond = 0.05;
constexpr int kStateWords = 4;  // range, value, position, end

inline void check_integers(const char* op, const char* argument, const Tensor& tensor, int64_t size) {
  ZTOK_CHECK(tensor.dim() == 1 && tensor.scalar_type() == ScalarType::Long && (size < 0 || tensor.size(0) == size), op,
             argument, ": expected int64, one-dimensional, of the size that the others have");
}

// int64 [streams + 1], checked
class Offsets {
 public:
  Offsets(const char* op, const Tensor& cu_symbols, int64_t total)
      : held_(torch::stable::contiguous(cu_symbols)), streams_(cu_symbols.numel() - 1) {
    check_integers(op, "cu_symbols", cu_symbols, -1);
    ZTOK_CHECK(streams_ >= 0 && at(0) == 0 && at(streams_) == total, op, "cu_symbols: expected 0 first and ", total,
               " last");
    for (int64_t b = 0; b < streams_; ++b) ZTOK_CHECK(at(b) <= at(b + 1), op, "cu_symbols: expected non-decreasing");
  }
  int64_t streams() const { return streams_; }
  int64_t at(int64_t b) const { return held_.const_data_ptr<int64_t>()[b]; }

 private:
  Tensor held_;
  int64_t streams_;
};

// The streams' bytes and the states of their decoders.
struct Streams {
  Tensor held, data, next;
  const int64_t* before;
  int64_t* after;
  const uint8_t* bytes;
  int64_t count, size;

  Streams(const char* op, const Tensor& state, const Tensor& data)
      : held(torch::stable::contiguous(state)), data(torch::stable::contiguous(data)) {
    ZTOK_CHECK(state.dim() == 2 && state.size(1) == kStateWords && state.scalar_type() == ScalarType::Long, op,
               "state: expected int64 [B, 4]");
    ZTOK_CHECK(data.dim() == 1 && data.scalar_type() == ScalarType::Byte, op, "data: expected uint8 [N]");
    count = state.size(0);
    size = data.size(0);
    next = new_tensor(state, {count, kStateWords}, ScalarType::Long);
    before = held.const_data_ptr<int64_t>();
    after = next.mutable_data_ptr<int64_t>();
    bytes = size > 0 ? this->data.const_data_ptr<uint8_t>() : nullptr;
    for (int64_t b = 0; b < count; ++b) {
      ZTOK_CHECK(static_cast<uint64_t>(before[b * kStateWords]) >= kLeastRange, op,
                 "state: expected what range_decoder gave, got a range that is too small");
    }
  }
  RangeDecoder decoder(int64_t b) const {
    const int64_t* row = before + b * kStateWords;
    return {static_cast<uint64_t>(row[0]), static_cast<uint64_t>(row[1]), row[2], row[3]};
  }
  void keep(int64_t b, const RangeDecoder& decoder) const {
    int64_t* row = after + b * kStateWords;
    row[0] = static_cast<int64_t>(decoder.range);
    row[1] = static_cast<int64_t>(decoder.value);
    row[2] = decoder.position;
    row[3] = decoder.end;
  }
};

}  // namespace ztok
