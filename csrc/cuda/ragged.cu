// ragged_pack and ragged_unpack on CUDA. No host synchronisation: safe inside a CUDA graph.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "ragged.h"
#include "ragged_copy.h"

namespace ztok {
namespace {

constexpr const char* kPack = "ragged_pack";
constexpr const char* kUnpack = "ragged_unpack";

void check_on_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& main) {
  ZTOK_CHECK(tensor.is_cuda() && tensor.get_device_index() == main.get_device_index(), op, argument,
             ": expected a tensor on CUDA device ", main.get_device_index());
}

// Values of offsets are not read on the host: whether they add up is for the op's own checks to say.
Tensor ragged_pack(const Tensor& padded, const Tensor& cu_seqlens, int64_t total, bool /*exact*/) {
  ZTOK_CHECK(total >= 0, kPack, "total: expected at least 0, got ", total);
  check_padded(kPack, padded);
  check_offsets_of_batch(kPack, cu_seqlens, padded.size(0));
  check_on_device(kPack, "padded", padded, padded);
  check_on_device(kPack, "cu_seqlens", cu_seqlens, padded);
  const torch::stable::accelerator::DeviceGuard guard(padded.get_device_index());
  const Tensor rows = with_contiguous_rows(padded, 2);
  const Tensor offsets = as_contiguous(cu_seqlens);
  const PaddedLayout layout = padded_layout(rows);
  Tensor packed = new_rows(padded, {total}, 2);
  const void* source = rows.const_data_ptr();
  void* target = packed.mutable_data_ptr();
  Alignment alignment;
  alignment.address(source).address(target).bytes(layout.row_bytes).bytes(layout.batch_stride).bytes(layout.row_stride);
  alignment.with_unit([&](auto unit) {
    using Unit = decltype(unit);
    constexpr int64_t size = sizeof(Unit);
    const PackRows<Unit> locator{
        static_cast<const Unit*>(source), indices_of(offsets),     layout.batch, layout.max_length,
        layout.batch_stride / size,       layout.row_stride / size};
    copy_rows<Unit>(kPack, locator, target, total, layout.row_bytes, nullptr,
                    current_stream(padded.get_device_index()));
  });
  return packed;
}

Tensor ragged_unpack(const Tensor& packed, const Tensor& cu_seqlens, int64_t max_length, double fill, bool /*exact*/) {
  ZTOK_CHECK(max_length >= 0, kUnpack, "max_length: expected at least 0, got ", max_length);
  check_packed(kUnpack, packed);
  check_indices(kUnpack, "cu_seqlens", cu_seqlens, "[B + 1]");
  ZTOK_CHECK(cu_seqlens.size(0) >= 1, kUnpack, "cu_seqlens: expected at least one offset, got none");
  check_on_device(kUnpack, "packed", packed, packed);
  check_on_device(kUnpack, "cu_seqlens", cu_seqlens, packed);
  const FillPattern pattern = fill_pattern(kUnpack, packed.scalar_type(), fill);
  const torch::stable::accelerator::DeviceGuard guard(packed.get_device_index());
  const Tensor rows = with_contiguous_rows(packed, 1);
  const Tensor offsets = as_contiguous(cu_seqlens);
  Tensor padded = new_rows(packed, {offsets.size(0) - 1, max_length}, 1);
  const int64_t row_bytes = row_bytes_of(rows, 1);
  const int64_t row_stride = rows.stride(0) * static_cast<int64_t>(rows.element_size());
  const void* source = rows.const_data_ptr();
  void* target = padded.mutable_data_ptr();
  Alignment alignment;
  alignment.address(source).address(target).bytes(row_bytes).bytes(row_stride);
  alignment.with_unit([&](auto unit) {
    using Unit = decltype(unit);
    const UnpackRows<Unit> locator{static_cast<const Unit*>(source), indices_of(offsets), rows.size(0), padded.size(1),
                                   row_stride / static_cast<int64_t>(sizeof(Unit))};
    copy_rows<Unit>(kUnpack, locator, target, padded.size(0) * padded.size(1), row_bytes, pattern.bytes,
                    current_stream(packed.get_device_index()));
  });
  return padded;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CUDA, m) {
  m.impl("ragged_pack", TORCH_BOX(&ztok::ragged_pack));
  m.impl("ragged_unpack", TORCH_BOX(&ztok::ragged_unpack));
}
