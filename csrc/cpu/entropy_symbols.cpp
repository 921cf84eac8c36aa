// symbol_intervals and decode_symbols on the CPU: tables of counts that may learn. Streams are shared among the
// threads.
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "entropy.h"

namespace ztok {
namespace {

// As in ztok_fast/ops/entropy/symbol_intervals.py.
constexpr int64_t kModelLimit = int64_t{1} << 16, kMostIncrement = kModelLimit, kMostCount = int64_t{1} << 31;

// A table of counts that learns.
class Model {
 public:
  Model(const int64_t* counts, int64_t size, int64_t increment)
      : counts_(counts, counts + size), increment_(static_cast<uint64_t>(increment)) {
    for (const uint64_t count : counts_) total_ += count;
  }
  uint64_t total() const { return total_; }
  Interval interval(int64_t symbol) const {
    uint64_t start = 0;
    for (int64_t s = 0; s < symbol; ++s) start += counts_[s];
    return {start, counts_[symbol], total_};
  }
  int64_t find(uint64_t value, Interval* interval) const {
    uint64_t start = 0;
    int64_t symbol = 0;
    for (; value - start >= counts_[symbol]; ++symbol) start += counts_[symbol];
    *interval = {start, counts_[symbol], total_};
    return symbol;
  }
  void learn(int64_t symbol) {
    counts_[symbol] += increment_;
    total_ += increment_;
    if (increment_ == 0 || total_ <= kModelLimit) return;
    total_ = 0;
    for (uint64_t& count : counts_) total_ += count = (count + 1) / 2;
  }

 private:
  std::vector<uint64_t> counts_;
  uint64_t increment_, total_ = 0;
};

// int64 [A], or [B, A] with a table per stream
struct Tables {
  Tensor held;
  int64_t alphabet, stride, increment;

  Tables(const char* op, const Tensor& counts, int64_t streams, int64_t increment)
      : held(torch::stable::contiguous(counts)), increment(increment) {
    const int64_t dims = counts.dim();
    ZTOK_CHECK((dims == 1 || (dims == 2 && counts.size(0) == streams)) && counts.scalar_type() == ScalarType::Long, op,
               "counts: expected int64 [A] or [B, A]");
    alphabet = counts.size(dims - 1);
    stride = dims == 2 ? alphabet : 0;
    ZTOK_CHECK(alphabet > 0 && alphabet <= kModelLimit, op, "counts: expected 1 to ", kModelLimit, " columns");
    ZTOK_CHECK(increment >= 0 && increment <= kMostIncrement, op, "increment: expected 0 to ", kMostIncrement);
    const int64_t* values = held.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < held.numel(); ++i) {
      ZTOK_CHECK(values[i] > 0 && values[i] <= kMostCount, op, "counts: expected values from 1 to 2^31");
    }
  }
  Model model(int64_t b) const { return {held.const_data_ptr<int64_t>() + b * stride, alphabet, increment}; }
  double nanoseconds(int64_t symbols) const { return symbols / kSymbolsPerNanosecond + symbols * alphabet; }
};

std::tuple<Tensor, Tensor, Tensor> symbol_intervals(const Tensor& symbols, const Tensor& counts,
                                                    const Tensor& cu_symbols, int64_t increment) {
  constexpr const char* op = "symbol_intervals";
  const int64_t number = symbols.numel();
  check_integers(op, "symbols", symbols, number);
  const Offsets offsets(op, cu_symbols, number);
  const Tables tables(op, counts, offsets.streams(), increment);
  const Tensor held = torch::stable::contiguous(symbols);
  const int64_t* symbol = held.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < number; ++i) {
    ZTOK_CHECK(symbol[i] >= 0 && symbol[i] < tables.alphabet, op, "symbols: expected values in [0, ", tables.alphabet,
               ")");
  }
  Tensor start = new_tensor(held, {number}), size = new_tensor(held, {number}), total = new_tensor(held, {number});
  auto *starts = start.mutable_data_ptr<int64_t>(), *sizes = size.mutable_data_ptr<int64_t>(),
       *totals = total.mutable_data_ptr<int64_t>();
  share(offsets.streams(), 16, tables.nanoseconds(number), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Model model = tables.model(b);
      for (int64_t i = offsets.at(b); i < offsets.at(b + 1); ++i) {
        const Interval interval = model.interval(symbol[i]);
        starts[i] = static_cast<int64_t>(interval.start);
        sizes[i] = static_cast<int64_t>(interval.size);
        totals[i] = static_cast<int64_t>(interval.total);
        model.learn(symbol[i]);
      }
    }
  });
  return {start, size, total};
}

std::tuple<Tensor, Tensor> decode_symbols(const Tensor& counts, const Tensor& state, const Tensor& data,
                                          const Tensor& cu_symbols, int64_t total, int64_t increment) {
  constexpr const char* op = "decode_symbols";
  ZTOK_CHECK(total >= 0, op, "total: expected at least 0");
  const Offsets offsets(op, cu_symbols, total);
  const Tables tables(op, counts, offsets.streams(), increment);
  const Streams streams(op, state, data);
  ZTOK_CHECK(streams.count == offsets.streams(), op, "state: expected a row for each stream of cu_symbols");
  Tensor symbols = new_tensor(state, {total}, ScalarType::Long);
  auto* symbol = symbols.mutable_data_ptr<int64_t>();
  share(streams.count, 16, tables.nanoseconds(total), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Model model = tables.model(b);
      RangeDecoder decoder = streams.decoder(b);
      for (int64_t i = offsets.at(b); i < offsets.at(b + 1); ++i) {
        Interval interval{};
        symbol[i] = model.find(decoder.peek(model.total()), &interval);
        decoder.consume(interval, streams.bytes, streams.size);
        model.learn(symbol[i]);
      }
      streams.keep(b, decoder);
    }
  });
  return {symbols, streams.next};
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("symbol_intervals", TORCH_BOX(&ztok::symbol_intervals));
  m.impl("decode_symbols", TORCH_BOX(&ztok::decode_symbols));
}
