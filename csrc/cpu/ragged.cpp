// ragged_pack on the CPU: padded [B, S, *] to packed [T, *].
#include <algorithm>
#include <cstring>

#include <torch/csrc/stable/library.h>

#include "ragged.h"

namespace ztok {
namespace {

constexpr const char* kOp = "ragged_pack";
constexpr int64_t kBytesPerTask = 64 * 1024;  // below this a second thread costs more than the copy

template <typename Offset>
void check_offsets(const PaddedLayout& layout, const Offset* cu_seqlens, int64_t total) {
  ZTOK_CHECK(cu_seqlens[0] == 0, kOp, "cu_seqlens[0]: expected 0, got ", cu_seqlens[0]);
  for (int64_t b = 0; b < layout.batch; ++b) {
    const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    ZTOK_CHECK(begin <= end, kOp, "cu_seqlens: expected non-decreasing offsets, got ", begin, " before ", end,
               " at sequence ", b);
    // Non-negative by induction from cu_seqlens[0] == 0, so the difference cannot overflow.
    ZTOK_CHECK(end - begin <= layout.max_length, kOp, "cu_seqlens: expected lengths of at most S = ",
               layout.max_length, ", got ", end - begin, " at sequence ", b);
  }
  ZTOK_CHECK(cu_seqlens[layout.batch] == total, kOp, "cu_seqlens[-1]: expected total = ", total, ", got ",
             cu_seqlens[layout.batch]);
}

// Writes packed rows [begin, end). A task is a range of packed rows, not of sequences, so that one long sequence
// among short ones is shared between threads.
template <typename Offset>
void pack_rows(const PaddedLayout& layout, const char* padded, const Offset* cu_seqlens, char* packed, int64_t begin,
               int64_t end) {
  int64_t sequence = std::upper_bound(cu_seqlens, cu_seqlens + layout.batch + 1, begin) - cu_seqlens - 1;
  for (int64_t row = begin; row < end; ++sequence) {
    const int64_t stop = std::min<int64_t>(end, cu_seqlens[sequence + 1]);
    const char* source = padded + sequence * layout.batch_stride + (row - cu_seqlens[sequence]) * layout.row_stride;
    if (layout.row_stride == layout.row_bytes) {
      std::memcpy(packed + row * layout.row_bytes, source, (stop - row) * layout.row_bytes);
      row = stop;
    } else {
      for (; row < stop; ++row, source += layout.row_stride) {
        std::memcpy(packed + row * layout.row_bytes, source, layout.row_bytes);
      }
    }
  }
}

template <typename Offset>
void pack(const PaddedLayout& layout, const Tensor& padded, const Tensor& cu_seqlens, Tensor& packed) {
  const auto* offsets = static_cast<const Offset*>(cu_seqlens.const_data_ptr());
  const int64_t total = packed.size(0);
  check_offsets(layout, offsets, total);
  if (total == 0 || layout.row_bytes == 0) return;
  const auto* source = static_cast<const char*>(padded.const_data_ptr());
  auto* target = static_cast<char*>(packed.mutable_data_ptr());
  const int64_t rows_per_task = std::max<int64_t>(1, kBytesPerTask / layout.row_bytes);
  torch::stable::parallel_for(0, total, rows_per_task, [&](int64_t begin, int64_t end) {
    pack_rows(layout, source, offsets, target, begin, end);
  });
}

void ragged_pack_out(const Tensor& padded, const Tensor& cu_seqlens, Tensor packed) {
  check_padded_and_offsets(kOp, padded, cu_seqlens);
  check_packed(kOp, padded, packed);
  ZTOK_CHECK(padded.is_cpu(), kOp, "padded: expected a CPU tensor");
  ZTOK_CHECK(cu_seqlens.is_cpu(), kOp, "cu_seqlens: expected a CPU tensor, the device of padded");
  ZTOK_CHECK(packed.is_cpu(), kOp, "packed: expected a CPU tensor, the device of padded");
  const Tensor rows = with_contiguous_rows(padded);
  const Tensor offsets = torch::stable::contiguous(cu_seqlens);
  const PaddedLayout layout = padded_layout(rows);
  has_int64_offsets(offsets) ? pack<int64_t>(layout, rows, offsets, packed)
                             : pack<int32_t>(layout, rows, offsets, packed);
}

Tensor ragged_pack(const Tensor& padded, const Tensor& cu_seqlens, int64_t total) {
  Tensor packed = new_packed(kOp, padded, total);
  ragged_pack_out(padded, cu_seqlens, packed);
  return packed;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) {
  m.def("ragged_pack_native(Tensor padded, Tensor cu_seqlens, int total) -> Tensor");
  m.def("ragged_pack_native_out(Tensor padded, Tensor cu_seqlens, Tensor(a!) packed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ztok, CPU, m) {
  m.impl("ragged_pack_native", TORCH_BOX(&ztok::ragged_pack));
  m.impl("ragged_pack_native_out", TORCH_BOX(&ztok::ragged_pack_out));
}
