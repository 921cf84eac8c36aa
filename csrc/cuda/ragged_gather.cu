// ragged_layout, ragged_gather and its backward on CUDA. No host synchronisation: safe inside a CUDA graph.
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "ragged_copy.h"
#include "ragged_gather_kernel.cuh"
#include "ragged_sources.h"
#include "ragged_sum.h"

namespace ztok {
namespace {

constexpr const char* kLayout = "ragged_layout";
constexpr const char* kGather = "ragged_gather";
constexpr const char* kBackward = "ragged_gather_backward";

Tensor new_int64(const Tensor& like, int64_t size) { return new_tensor(like, {size}, ScalarType::Long); }

int64_t* int64_data(Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

// The sources in groups of kMaxSources. A group is what one launch sees; the offsets of all sources before and after it
// reach it as sums, which change from group to group, in order of the stream.
class Groups {
 public:
  Groups(const char* op, const Tensors& offsets, const std::vector<int64_t>& totals, cudaStream_t stream)
      : op_(op), offsets_(offsets), totals_(totals), stream_(stream), batch_(offsets[0].size(0) - 1) {
    if (count() == 1) return;
    before_ = new_int64(offsets[0], batch_ + 1);
    after_ = new_int64(offsets[0], batch_ + 1);
    for (Tensor* sums : {&*before_, &*after_}) {
      const cudaError_t error = cudaMemsetAsync(sums->mutable_data_ptr(), 0, (batch_ + 1) * sizeof(int64_t), stream_);
      ZTOK_CHECK(error == cudaSuccess, op_, "CUDA: ", cudaGetErrorString(error));
    }
    for (size_t group = 1; group < count(); ++group) add(*after_, group, 1);
  }

  size_t count() const { return (offsets_.size() + kMaxSources - 1) / kMaxSources; }
  size_t first(size_t group) const { return group * kMaxSources; }

  // Calls f(group, interleave) for every group in order.
  template <typename F>
  void for_each(const F& f) {
    for (size_t group = 0; group < count(); ++group) {
      if (group > 0) {
        add(*before_, group - 1, 1);
        add(*after_, group, -1);
      }
      f(group, interleave(group));
    }
  }

 private:
  Interleave interleave(size_t group) const {
    Interleave layout{};
    const size_t end = std::min(offsets_.size(), first(group + 1));
    layout.batch = batch_;
    for (size_t i = 0; i < first(group); ++i) layout.rows_before += totals_[i];
    for (size_t i = first(group); i < end; ++i, ++layout.count) {
      layout.cu_seqlens[layout.count] = indices_of(offsets_[i]);
      layout.totals[layout.count] = totals_[i];
    }
    if (before_) {
      layout.before = static_cast<const int64_t*>(before_->const_data_ptr());
      layout.after = static_cast<const int64_t*>(after_->const_data_ptr());
    }
    return layout;
  }

  void add(Tensor& sums, size_t group, int64_t sign) const {
    const Interleave layout = interleave(group);
    add_offsets_kernel<<<blocks_for(batch_ + 1, kThreads), kThreads, 0, stream_>>>(layout, sign, int64_data(sums));
    check_launch(op_);
  }

  const char* op_;
  const Tensors& offsets_;
  const std::vector<int64_t>& totals_;
  cudaStream_t stream_;
  int64_t batch_;
  std::optional<Tensor> before_, after_;
};

// What a layout consists of; null is left out. Merged offsets and position ids come from the first group.
void launch_layout(const char* op, size_t group, const Interleave& layout, int64_t total, Tensor* merged,
                   int64_t* position_ids, int64_t* destinations, cudaStream_t stream) {
  MutableIndices offsets{};
  if (group == 0 && merged) offsets = {merged->mutable_data_ptr(), is_wide(*merged)};
  layout_kernel<<<blocks_for(std::max(total, layout.batch + 1), kThreads), kThreads, 0, stream>>>(
      layout, total, offsets, group == 0 ? position_ids : nullptr, destinations);
  check_launch(op);
}

// Values of offsets and indices are not read on the host: whether they are valid is for the op's own checks to say.
std::tuple<Tensor, Tensor, Tensor> ragged_layout(const Tensors cu_seqlens, const std::vector<int64_t> totals,
                                                 bool /*exact*/) {
  check_totals(kLayout, totals);
  ZTOK_CHECK(!cu_seqlens.empty() && cu_seqlens[0].is_cuda(), kLayout, "cu_seqlens: expected CUDA tensors");
  const Tensors offsets = checked_offsets(kLayout, cu_seqlens, totals.size(), cu_seqlens[0]);
  const int64_t total = sum_of(totals);
  const torch::stable::accelerator::DeviceGuard guard(offsets[0].get_device_index());
  const cudaStream_t stream = current_stream(offsets[0].get_device_index());
  Tensor merged = new_rows(offsets[0], {}, 0);
  Tensor position_ids = new_int64(offsets[0], total), destinations = new_int64(offsets[0], total);
  Groups groups(kLayout, offsets, totals, stream);
  groups.for_each([&](size_t group, const Interleave& layout) {
    launch_layout(kLayout, group, layout, total, &merged, int64_data(position_ids), int64_data(destinations), stream);
  });
  return {merged, position_ids, destinations};
}

std::vector<int64_t> rows_of(const Tensors& tables) {
  std::vector<int64_t> rows;
  for (const Tensor& table : tables) rows.push_back(table.size(0));
  return rows;
}

int64_t stride_bytes(const Tensor& rows) { return rows.stride(0) * static_cast<int64_t>(rows.element_size()); }

std::tuple<Tensor, Tensor, Tensor> ragged_gather(const Tensors tables, const OptionalTensors indices,
                                                 const Tensors cu_seqlens, bool /*exact*/) {
  const Tensors rows = checked_tables(kGather, tables);
  ZTOK_CHECK(rows[0].is_cuda(), kGather, "tables: expected CUDA tensors");
  const OptionalTensors picks = checked_row_indices(kGather, indices, rows.size(), rows[0]);
  const Tensors offsets = checked_offsets(kGather, cu_seqlens, rows.size(), rows[0]);
  const std::vector<int64_t> totals = source_totals(rows_of(rows), picks);
  const int64_t total = sum_of(totals), bytes = row_bytes_of(rows[0], 1);
  const torch::stable::accelerator::DeviceGuard guard(rows[0].get_device_index());
  const cudaStream_t stream = current_stream(rows[0].get_device_index());
  Tensor merged = new_rows(offsets[0], {}, 0);
  Tensor values = new_rows(rows[0], {total}, 1), position_ids = new_int64(offsets[0], total);
  Groups groups(kGather, offsets, totals, stream);
  const bool copies = total > 0 && bytes > 0;
  if (copies && groups.count() > 1) {
    // Each group writes the rows of its own sources; what no sequence covers is zero.
    const cudaError_t error = cudaMemsetAsync(values.mutable_data_ptr(), 0, total * bytes, stream);
    ZTOK_CHECK(error == cudaSuccess, kGather, "CUDA: ", cudaGetErrorString(error));
  }
  Alignment alignment;
  alignment.address(values.const_data_ptr()).bytes(bytes);
  for (const Tensor& table : rows) alignment.address(table.const_data_ptr()).bytes(stride_bytes(table));
  groups.for_each([&](size_t group, const Interleave& layout) {
    // The gather writes position ids on its way; without anything to copy the layout does.
    int64_t* positions = group == 0 ? int64_data(position_ids) : nullptr;
    if (group == 0) {
      launch_layout(kGather, 0, layout, copies ? 0 : total, &merged, copies ? nullptr : positions, nullptr, stream);
    }
    if (!copies) return;
    alignment.with_unit([&](auto unit) {
      using Unit = decltype(unit);
      GatherRows<Unit> locator{};
      locator.layout = layout;
      locator.position_ids = positions;
      for (int i = 0; i < layout.count; ++i) {
        const size_t source = groups.first(group) + i;
        locator.tables[i] = static_cast<const Unit*>(rows[source].const_data_ptr());
        locator.table_rows[i] = rows[source].size(0);
        locator.table_strides[i] = stride_bytes(rows[source]) / static_cast<int64_t>(sizeof(Unit));
        if (picks[source]) locator.indices[i] = indices_of(*picks[source]);
        // An empty index has no address, which must not read as "no index"; nothing is read through it.
        if (picks[source] && !locator.indices[i].data) locator.indices[i].data = locator.layout.cu_seqlens[i].data;
      }
      copy_rows<Unit>(kGather, locator, values.mutable_data_ptr(), total, bytes, nullptr, stream);
    });
  });
  return {values, merged, position_ids};
}

Tensors ragged_gather_backward(const Tensor& grad, const OptionalTensors indices, const Tensors cu_seqlens,
                               const std::vector<int64_t> table_rows, const std::vector<bool> needed) {
  ZTOK_CHECK(grad.is_cuda() && grad.dim() == 2, kBackward, "grad: expected a CUDA tensor [T, D]");
  ZTOK_CHECK(table_rows.size() == indices.size() && needed.size() == indices.size(), kBackward,
             "table_rows, needed: expected one entry per source");
  check_totals(kBackward, table_rows);
  const Tensors offsets = checked_offsets(kBackward, cu_seqlens, indices.size(), grad);
  const OptionalTensors picks = checked_row_indices(kBackward, indices, indices.size(), grad);
  const std::vector<int64_t> totals = source_totals(table_rows, picks);
  const int64_t total = sum_of(totals);
  ZTOK_CHECK(grad.size(0) == total, kBackward, "grad: expected ", total, " rows, got ", grad.size(0));
  const Tensor rows = with_contiguous_rows(grad, 1);
  const int64_t bytes = row_bytes_of(rows, 1);
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
  const cudaStream_t stream = current_stream(rows.get_device_index());
  Tensors results;
  for (size_t i = 0; i < indices.size(); ++i) {
    results.push_back(new_rows(rows, {needed[i] ? table_rows[i] : 0}, 1));
  }
  Groups groups(kBackward, offsets, totals, stream);
  groups.for_each([&](size_t group, const Interleave& layout) {
    for (int i = 0; i < layout.count; ++i) {
      const size_t source = groups.first(group) + i;
      if (!needed[source] || bytes == 0) continue;
      if (picks[source]) {
        const RowPairs pairs{indices_of(*picks[source]), totals[source], &layout, i};
        sum_rows_by_index(kBackward, rows, pairs, results[source], stream);
        continue;
      }
      void* target = results[source].mutable_data_ptr();
      Alignment alignment;
      alignment.address(rows.const_data_ptr()).address(target).bytes(bytes).bytes(stride_bytes(rows));
      alignment.with_unit([&](auto unit) {
        using Unit = decltype(unit);
        const ReturnRows<Unit> locator{layout, i, static_cast<const Unit*>(rows.const_data_ptr()), total,
                                       stride_bytes(rows) / static_cast<int64_t>(sizeof(Unit))};
        copy_rows<Unit>(kBackward, locator, target, table_rows[source], bytes, nullptr, stream);
      });
    }
  });
  return results;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CUDA, m) {
  m.impl("ragged_layout", TORCH_BOX(&ztok::ragged_layout));
  m.impl("ragged_gather", TORCH_BOX(&ztok::ragged_gather));
  m.impl("ragged_gather_backward", TORCH_BOX(&ztok::ragged_gather_backward));
}
