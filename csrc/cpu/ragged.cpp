// ragged_pack and ragged_unpack on the CPU.
#include <torch/csrc/stable/library.h>

#include "ragged_copy.h"

namespace ztok {
namespace {

constexpr const char* kPack = "ragged_pack";
constexpr const char* kUnpack = "ragged_unpack";

// Writes packed rows [begin, end).
void pack_rows(const PaddedLayout& layout, const char* padded, const Indices& cu_seqlens, char* packed, int64_t begin,
               int64_t end, const RowWriter& writer) {
  const int64_t bytes = layout.row_bytes, covered = std::min(end, cu_seqlens[layout.batch]);
  int64_t row = begin;
  int64_t sequence = sequence_of([&](int64_t b) { return cu_seqlens[b]; }, layout.batch, row);
  for (; row < covered; ++sequence) {
    const int64_t stop = std::min(covered, cu_seqlens[sequence + 1]);
    const char* source = padded + sequence * layout.batch_stride + (row - cu_seqlens[sequence]) * layout.row_stride;
    if (layout.row_stride == bytes) {
      writer.copy(packed + row * bytes, source, (stop - row) * bytes);
      row = stop;
    } else {
      for (; row < stop; ++row, source += layout.row_stride) writer.copy(packed + row * bytes, source, bytes);
    }
  }
  if (row < end) std::memset(packed + row * bytes, 0, (end - row) * bytes);
}

Tensor ragged_pack(const Tensor& padded, const Tensor& cu_seqlens, int64_t total, bool exact) {
  ZTOK_CHECK(total >= 0, kPack, "total: expected the number of packed rows, at least 0, got ", total);
  check_padded(kPack, padded);
  check_offsets_of_batch(kPack, cu_seqlens, padded.size(0));
  ZTOK_CHECK(padded.is_cpu() && cu_seqlens.is_cpu(), kPack, "expected CPU tensors");
  const Tensor rows = with_contiguous_rows(padded, 2);
  const Tensor offsets = as_contiguous(cu_seqlens);
  const PaddedLayout layout = padded_layout(rows);
  const Indices starts = indices_of(offsets);
  check_offset_values(kPack, starts, layout.batch, total, layout.max_length, exact);
  Tensor packed = with_huge_pages(new_rows(padded, {total}, 2));
  const auto* source = static_cast<const char*>(rows.const_data_ptr());
  auto* target = static_cast<char*>(packed.mutable_data_ptr());
  if (layout.row_bytes == 0) return packed;
  for_rows(total, layout.row_bytes, [&](int64_t begin, int64_t end) {
    const RowWriter writer(total * layout.row_bytes);
    pack_rows(layout, source, starts, target, begin, end, writer);
  });
  return packed;
}

Tensor ragged_unpack(const Tensor& packed, const Tensor& cu_seqlens, int64_t max_length, double fill, bool exact) {
  ZTOK_CHECK(max_length >= 0, kUnpack, "max_length: expected at least 0, got ", max_length);
  check_packed(kUnpack, packed);
  check_indices(kUnpack, "cu_seqlens", cu_seqlens, "[B + 1]");
  ZTOK_CHECK(cu_seqlens.size(0) >= 1, kUnpack, "cu_seqlens: expected at least one offset, got none");
  ZTOK_CHECK(packed.is_cpu() && cu_seqlens.is_cpu(), kUnpack, "expected CPU tensors");
  const FillPattern pattern = fill_pattern(kUnpack, packed.scalar_type(), fill);
  const Tensor rows = with_contiguous_rows(packed, 1);
  const Tensor offsets = as_contiguous(cu_seqlens);
  const Indices starts = indices_of(offsets);
  const int64_t batch = offsets.size(0) - 1, num_rows = batch * max_length;
  check_offset_values(kUnpack, starts, batch, rows.size(0), max_length, exact);
  Tensor padded = with_huge_pages(new_rows(packed, {batch, max_length}, 1));
  const int64_t bytes = row_bytes_of(rows, 1), stride = rows.stride(0) * static_cast<int64_t>(rows.element_size());
  const auto* source = static_cast<const char*>(rows.const_data_ptr());
  auto* target = static_cast<char*>(padded.mutable_data_ptr());
  if (bytes == 0) return padded;
  for_rows(num_rows, bytes, [&](int64_t begin, int64_t end) {
    const RowWriter writer(num_rows * bytes);
    for (int64_t row = begin; row < end;) {
      const int64_t sequence = row / max_length, first = sequence * max_length;
      const int64_t filled = std::clamp(first + starts[sequence + 1] - starts[sequence], row, end);
      const int64_t stop = std::min(end, first + max_length);
      const char* from = source + (starts[sequence] + row - first) * stride;
      if (stride == bytes) {
        writer.copy(target + row * bytes, from, (filled - row) * bytes);
      } else {
        for (int64_t r = row; r < filled; ++r, from += stride) writer.copy(target + r * bytes, from, bytes);
      }
      writer.fill(target + filled * bytes, pattern, (stop - filled) * bytes);
      row = stop;
    }
  });
  return padded;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("ragged_pack", TORCH_BOX(&ztok::ragged_pack));
  m.impl("ragged_unpack", TORCH_BOX(&ztok::ragged_unpack));
}
