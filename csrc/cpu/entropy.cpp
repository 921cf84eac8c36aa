// token_intervals, decode_tokens and range_encode on the CPU. Rows and streams are shared among the threads; a stream
// is coded by one.
#include "entropy.h"

#include <atomic>
#include <cstring>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "entropy_kernel.h"
#include "standard_arithmetic.h"

namespace ztok {
namespace {

constexpr double kCountsPerNanosecond = 3;

// float32 [rows, width]
struct Logits {
  Tensor held;
  int64_t rows, width;

  Logits(const char* op, const Tensor& logits) : held(with_adjacent_elements(logits)) {
    ZTOK_CHECK(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float, op, "logits: expected float32 [T, V]");
    rows = logits.size(0);
    width = logits.size(1);
    ZTOK_CHECK(width > 0 && width <= kMostTokens, op, "logits: expected 1 to ", kMostTokens, " columns");
  }
  const float* row(int64_t i) const { return held.const_data_ptr<float>() + i * held.stride(0); }

  // Calls body(row) -> whether it is finite for all rows, on some threads.
  template <typename Body>
  void each(const char* op, const Body& body) const {
    std::atomic<bool> finite{true};
    share(rows, 16, static_cast<double>(rows) * width / kCountsPerNanosecond, [&](int64_t begin, int64_t end) {
      const StandardArithmetic standard;  // counts are floats that are rounded
      for (int64_t i = begin; i < end; ++i) {
        if (!body(i)) finite = false;
      }
    });
    ZTOK_CHECK(finite, op, "logits: expected finite values");
  }
};

std::tuple<Tensor, Tensor, Tensor> token_intervals(const Tensor& logits, const Tensor& targets) {
  constexpr const char* op = "token_intervals";
  const Logits given(op, logits);
  check_integers(op, "targets", targets, given.rows);
  const Tensor wanted = torch::stable::contiguous(targets);
  Tensor start = new_tensor(wanted, {given.rows}), size = new_tensor(wanted, {given.rows}),
         total = new_tensor(wanted, {given.rows});
  const int64_t* target = wanted.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < given.rows; ++i) {
    ZTOK_CHECK(target[i] >= 0 && target[i] < given.width, op, "targets: expected values in [0, ", given.width, ")");
  }
  auto *starts = start.mutable_data_ptr<int64_t>(), *sizes = size.mutable_data_ptr<int64_t>(),
       *totals = total.mutable_data_ptr<int64_t>();
  const auto interval_of = ZTOK_SELECT(token_interval);
  given.each(op, [&](int64_t i) {
    Interval interval{};
    const bool finite = interval_of(given.row(i), given.width, target[i], &interval);
    starts[i] = static_cast<int64_t>(interval.start);
    sizes[i] = static_cast<int64_t>(interval.size);
    totals[i] = static_cast<int64_t>(interval.total);
    return finite;
  });
  return {start, size, total};
}

std::tuple<Tensor, Tensor> decode_tokens(const Tensor& logits, const Tensor& state, const Tensor& data) {
  constexpr const char* op = "decode_tokens";
  const Logits given(op, logits);
  const Streams streams(op, state, data);
  ZTOK_CHECK(streams.count == given.rows, op, "state: expected a row for each of logits");
  Tensor tokens = new_tensor(state, {given.rows}, ScalarType::Long);
  auto* token = tokens.mutable_data_ptr<int64_t>();
  const auto count = ZTOK_SELECT(count_row);
  const auto find = ZTOK_SELECT(find_token);
  given.each(op, [&](int64_t i) {
    RowCounts row;
    if (!count(given.row(i), given.width, &row)) return false;
    RangeDecoder decoder = streams.decoder(i);
    Interval interval{};
    token[i] = find(given.row(i), given.width, row, decoder.peek(row.total), &interval);
    decoder.consume(interval, streams.bytes, streams.size);
    streams.keep(i, decoder);
    return true;
  });
  return {tokens, streams.next};
}

std::tuple<Tensor, Tensor> range_encode(const Tensor& start, const Tensor& size, const Tensor& total,
                                        const Tensor& cu_symbols) {
  constexpr const char* op = "range_encode";
  const int64_t symbols = start.numel();
  check_integers(op, "start", start, symbols);
  check_integers(op, "size", size, symbols);
  check_integers(op, "total", total, symbols);
  const Offsets offsets(op, cu_symbols, symbols);
  const Tensor held[] = {torch::stable::contiguous(start), torch::stable::contiguous(size),
                         torch::stable::contiguous(total)};
  const int64_t *starts = held[0].const_data_ptr<int64_t>(), *sizes = held[1].const_data_ptr<int64_t>(),
                *totals = held[2].const_data_ptr<int64_t>();
  for (int64_t i = 0; i < symbols; ++i) {
    const bool fits = starts[i] >= 0 && sizes[i] > 0 && totals[i] > 0 && totals[i] < static_cast<int64_t>(kTotalLimit);
    ZTOK_CHECK(fits && starts[i] <= totals[i] && sizes[i] <= totals[i] - starts[i], op,
               "expected 0 <= start < start + size <= total < 2^49, got ", starts[i], ", ", sizes[i], " and ",
               totals[i], " for symbol ", i);
  }
  const int64_t count = offsets.streams(), capacity = kBytesPerSymbol * symbols + kBytesAtEnd * count;
  Tensor data = new_tensor(start, {capacity}, ScalarType::Byte), cu_bytes = new_tensor(start, {count + 1});
  auto* bytes = data.mutable_data_ptr<uint8_t>();
  auto* ends = cu_bytes.mutable_data_ptr<int64_t>();
  const auto room = [&](int64_t b) { return bytes + kBytesPerSymbol * offsets.at(b) + kBytesAtEnd * b; };
  share(count, 16, symbols / kSymbolsPerNanosecond, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      RangeEncoder encoder(room(b));
      for (int64_t i = offsets.at(b); i < offsets.at(b + 1); ++i) {
        encoder.encode(
            {static_cast<uint64_t>(starts[i]), static_cast<uint64_t>(sizes[i]), static_cast<uint64_t>(totals[i])});
      }
      ends[b + 1] = encoder.finish() - room(b);
    }
  });
  ends[0] = 0;
  for (int64_t b = 0; b < count; ++b) {
    std::memmove(bytes + ends[b], room(b), static_cast<size_t>(ends[b + 1]));
    ends[b + 1] += ends[b];
  }
  if (capacity > 0) std::memset(bytes + ends[count], 0, static_cast<size_t>(capacity - ends[count]));
  return {data, cu_bytes};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("token_intervals", TORCH_BOX(&ztok::token_intervals));
  m.impl("decode_tokens", TORCH_BOX(&ztok::decode_tokens));
  m.impl("range_encode", TORCH_BOX(&ztok::range_encode));
}
