// ragged_layout, ragged_gather and its backward on the CPU.
#include <atomic>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "ragged_copy.h"
#include "ragged_sources.h"
#include "ragged_sum.h"

namespace ztok {
namespace {

constexpr const char* kLayout = "ragged_layout";
constexpr const char* kGather = "ragged_gather";
constexpr const char* kBackward = "ragged_gather_backward";
constexpr int64_t kAhead = 4;  // rows of a table that are asked for before they are copied

// How the rows of all sources interleave: sequence b of the result is source 0's sequence b, then source 1's and so on.
class Sources {
 public:
  // `exact`: the offsets of every source end at its total.
  Sources(const char* op, const Tensors& offsets, std::vector<int64_t> totals, bool exact)
      : totals_(std::move(totals)) {
    batch_ = offsets[0].size(0) - 1;
    for (size_t i = 0; i < offsets.size(); ++i) {
      starts_.push_back(indices_of(offsets[i]));
      check_offset_values(op, starts_[i], batch_, totals_[i], totals_[i], exact);
    }
    merged_.assign(batch_ + 1, 0);
    for (const Indices& starts : starts_) {
      for (int64_t b = 0; b <= batch_; ++b) merged_[b] += starts[b];
    }
  }

  int64_t total() const { return sum_of(totals_); }
  int64_t covered() const { return merged_[batch_]; }  // rows past it are slack
  int64_t covered(size_t source) const { return starts_[source][batch_]; }
  int64_t source_total(size_t source) const { return totals_[source]; }

  // Calls f(source, source_row, out_row, count) for the pieces of output rows [begin, end) that are contiguous in a
  // source, and g(out_row, position, count) for those that are contiguous in a sequence. Slack is left out.
  template <typename F, typename G>
  void walk(int64_t begin, int64_t end, const F& f, const G& g) const {
    end = std::min(end, covered());
    if (begin >= end) return;
    int64_t sequence = sequence_of([this](int64_t b) { return merged_[b]; }, batch_, begin);
    for (int64_t row = begin; row < end; ++sequence) {
      const int64_t stop = std::min(end, merged_[sequence + 1]);
      if (row >= stop) continue;
      g(row, row - merged_[sequence], stop - row);
      int64_t piece = merged_[sequence];  // output row where the source's sequence begins
      for (size_t i = 0; i < starts_.size() && piece < stop; ++i) {
        const int64_t first = starts_[i][sequence], next = piece + starts_[i][sequence + 1] - first;
        const int64_t from = std::max(row, piece), to = std::min(stop, next);
        if (from < to) f(i, first + from - piece, from, to - from);
        piece = next;
      }
      row = stop;
    }
  }

  Tensor merged_like(const Tensor& offsets) const {
    Tensor merged = new_tensor(offsets, {batch_ + 1});
    if (is_wide(merged)) {
      std::copy(merged_.begin(), merged_.end(), static_cast<int64_t*>(merged.mutable_data_ptr()));
    } else {
      auto* narrow = static_cast<int32_t*>(merged.mutable_data_ptr());
      for (int64_t b = 0; b <= batch_; ++b) narrow[b] = static_cast<int32_t>(merged_[b]);
    }
    return merged;
  }

 private:
  int64_t batch_;
  std::vector<Indices> starts_;
  std::vector<int64_t> totals_;
  std::vector<int64_t> merged_;
};

Tensor new_int64(const Tensor& like, int64_t size) { return new_tensor(like, {size}, ScalarType::Long); }

int64_t* int64_data(Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

void count_up(int64_t* to, int64_t first, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] = first + k;
}

// Output row of every source's rows, source 0's first. Slack rows follow the last sequence.
void write_destinations(const Sources& sources, size_t num_sources, int64_t* destinations, int64_t* position_ids) {
  std::vector<int64_t*> parts{destinations};
  int64_t slack = sources.covered();
  for (size_t i = 0; i < num_sources; ++i) {
    const int64_t used = sources.covered(i), unused = sources.source_total(i) - used;
    count_up(parts[i] + used, slack, unused);
    slack += unused;
    parts.push_back(parts[i] + sources.source_total(i));
  }
  for_rows(sources.covered(), 16, [&](int64_t begin, int64_t end) {
    sources.walk(
        begin, end,
        [&](size_t source, int64_t row, int64_t out, int64_t count) { count_up(parts[source] + row, out, count); },
        [&](int64_t out, int64_t position, int64_t count) {
          if (position_ids) count_up(position_ids + out, position, count);
        });
  });
  if (position_ids) std::fill(position_ids + sources.covered(), position_ids + sources.total(), 0);
}

std::tuple<Tensor, Tensor, Tensor> ragged_layout(const Tensors cu_seqlens, const std::vector<int64_t> totals,
                                                 bool exact) {
  check_totals(kLayout, totals);
  ZTOK_CHECK(!cu_seqlens.empty() && cu_seqlens[0].is_cpu(), kLayout, "cu_seqlens: expected CPU tensors");
  const Tensors offsets = checked_offsets(kLayout, cu_seqlens, totals.size(), cu_seqlens[0]);
  const Sources sources(kLayout, offsets, totals, exact);
  Tensor position_ids = new_int64(offsets[0], sources.total());
  Tensor destinations = new_int64(offsets[0], sources.total());
  write_destinations(sources, totals.size(), int64_data(destinations), int64_data(position_ids));
  return {sources.merged_like(offsets[0]), position_ids, destinations};
}

struct Table {
  const char* data;
  int64_t stride;  // bytes
  int64_t rows;
  std::optional<Indices> indices;
};

std::vector<int64_t> rows_of(const Tensors& tables) {
  std::vector<int64_t> rows;
  for (const Tensor& table : tables) rows.push_back(table.size(0));
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> ragged_gather(const Tensors tables, const OptionalTensors indices,
                                                 const Tensors cu_seqlens, bool exact) {
  const Tensors rows = checked_tables(kGather, tables);
  ZTOK_CHECK(rows[0].is_cpu(), kGather, "expected CPU tensors");
  const OptionalTensors picks = checked_row_indices(kGather, indices, rows.size(), rows[0]);
  const Tensors offsets = checked_offsets(kGather, cu_seqlens, rows.size(), rows[0]);
  const Sources sources(kGather, offsets, source_totals(rows_of(rows), picks), exact);
  const int64_t total = sources.total(), bytes = row_bytes_of(rows[0], 1);
  Tensor values = with_huge_pages(new_rows(rows[0], {total}, 1));
  std::vector<Table> from;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t stride = rows[i].stride(0) * static_cast<int64_t>(rows[i].element_size());
    from.push_back({static_cast<const char*>(rows[i].const_data_ptr()), stride, rows[i].size(0),
                    picks[i] ? std::make_optional(indices_of(*picks[i])) : std::nullopt});
  }
  Tensor position_ids = new_int64(offsets[0], total);
  int64_t* positions = int64_data(position_ids);
  auto* target = static_cast<char*>(values.mutable_data_ptr());
  std::atomic<int64_t> bad_source{-1};
  for_rows(total, bytes + 8, [&](int64_t begin, int64_t end) {
    const RowWriter writer(total * bytes);
    const auto copy_piece = [&](size_t source, int64_t row, int64_t out, int64_t count) {
      const Table& table = from[source];
      char* to = target + out * bytes;
      if (!table.indices) {
        if (table.stride == bytes) return writer.copy(to, table.data + row * bytes, count * bytes);
        for (int64_t k = 0; k < count; ++k) writer.copy(to + k * bytes, table.data + (row + k) * table.stride, bytes);
        return;
      }
      for (int64_t k = 0; k < count; ++k) {
        if (k + kAhead < count) {
          const int64_t later = (*table.indices)[row + k + kAhead];
          if (later >= 0 && later < table.rows) RowWriter::prefetch(table.data + later * table.stride, bytes);
        }
        const int64_t pick = (*table.indices)[row + k];
        if (pick < 0 || pick >= table.rows) {
          bad_source = static_cast<int64_t>(source);
          return;
        }
        writer.copy(to + k * bytes, table.data + pick * table.stride, bytes);
      }
    };
    sources.walk(begin, end, copy_piece,
                 [&](int64_t out, int64_t position, int64_t count) { count_up(positions + out, position, count); });
    const int64_t slack = std::max(begin, sources.covered());
    if (slack < end) {
      std::memset(target + slack * bytes, 0, (end - slack) * bytes);
      std::fill(positions + slack, positions + end, 0);
    }
  });
  ZTOK_CHECK(bad_source < 0, kGather, "indices[", bad_source.load(), "]: expected rows of the table");
  return {values, sources.merged_like(offsets[0]), position_ids};
}

Tensors ragged_gather_backward(const Tensor& grad, const OptionalTensors indices, const Tensors cu_seqlens,
                               const std::vector<int64_t> table_rows, const std::vector<bool> needed) {
  ZTOK_CHECK(grad.is_cpu() && grad.dim() == 2, kBackward, "grad: expected a CPU tensor [T, D]");
  ZTOK_CHECK(table_rows.size() == indices.size() && needed.size() == indices.size(), kBackward,
             "table_rows, needed: expected one entry per source");
  check_totals(kBackward, table_rows);
  const Tensors offsets = checked_offsets(kBackward, cu_seqlens, indices.size(), grad);
  const OptionalTensors picks = checked_row_indices(kBackward, indices, indices.size(), grad);
  const Sources sources(kBackward, offsets, source_totals(table_rows, picks), false);
  ZTOK_CHECK(grad.size(0) == sources.total(), kBackward, "grad: expected ", sources.total(), " rows, got ",
             grad.size(0));
  const Tensor rows = with_contiguous_rows(grad, 1);
  const int64_t bytes = row_bytes_of(rows, 1), stride = rows.stride(0) * static_cast<int64_t>(rows.element_size());
  const auto* from = static_cast<const char*>(rows.const_data_ptr());

  Tensors results;
  std::vector<char*> copied(indices.size(), nullptr);  // targets of the sources that take their table's own rows
  bool any_copied = false, any_summed = false;
  for (size_t i = 0; i < indices.size(); ++i) {
    results.push_back(with_huge_pages(new_rows(rows, {needed[i] ? table_rows[i] : 0}, 1)));
    if (!needed[i] || bytes == 0) continue;
    (picks[i] ? any_summed : any_copied) = true;
    if (picks[i]) continue;
    copied[i] = static_cast<char*>(results[i].mutable_data_ptr());
    std::memset(copied[i] + sources.covered(i) * bytes, 0, (table_rows[i] - sources.covered(i)) * bytes);
  }
  if (any_copied) {
    for_rows(sources.covered(), bytes, [&](int64_t begin, int64_t end) {
      const RowWriter writer(sources.covered() * bytes);
      const auto copy_piece = [&](size_t source, int64_t row, int64_t out, int64_t count) {
        if (!copied[source]) return;
        for (int64_t k = 0; k < count; ++k) {
          writer.copy(copied[source] + (row + k) * bytes, from + (out + k) * stride, bytes);
        }
      };
      sources.walk(begin, end, copy_piece, [](int64_t, int64_t, int64_t) {});
    });
  }
  if (any_summed) {
    std::vector<int64_t> destinations(sources.total());
    write_destinations(sources, indices.size(), destinations.data(), nullptr);
    const int64_t* part = destinations.data();
    for (size_t i = 0; i < indices.size(); part += sources.source_total(i++)) {
      if (!needed[i] || !picks[i] || bytes == 0) continue;
      sum_rows_by_index(kBackward, rows, {indices_of(*picks[i]), part, sources.covered(i)}, results[i]);
    }
  }
  return results;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("ragged_layout", TORCH_BOX(&ztok::ragged_layout));
  m.impl("ragged_gather", TORCH_BOX(&ztok::ragged_gather));
  m.impl("ragged_gather_backward", TORCH_BOX(&ztok::ragged_gather_backward));
}
