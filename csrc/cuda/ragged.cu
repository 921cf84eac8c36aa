// ragged_pack on CUDA: padded [B, S, *] to packed [T, *]. No host synchronisation: safe inside a CUDA graph.
#include <algorithm>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "ragged.h"
#include "ragged_kernel.cuh"
#include "stream.h"

namespace ztok {
namespace {

constexpr const char* kOp = "ragged_pack";
constexpr int kThreadsPerBlock = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // more rows than these cover are reached by the kernel's loop

template <typename Unit, typename Offset>
void launch(const PaddedLayout& layout, const Tensor& padded, const Tensor& cu_seqlens, Tensor& packed) {
  constexpr int64_t unit = sizeof(Unit);
  const int64_t total = packed.size(0);
  const int64_t row_units = layout.row_bytes / unit;
  int threads_per_row = 1;
  while (threads_per_row < row_units && threads_per_row < kThreadsPerBlock) threads_per_row *= 2;
  const dim3 block(threads_per_row, kThreadsPerBlock / threads_per_row);
  const int64_t blocks = std::min<int64_t>((total + block.y - 1) / block.y, kMaxBlocks);
  const cudaStream_t stream = current_stream(padded.get_device_index());
  ragged_pack_kernel<Unit, Offset><<<static_cast<unsigned>(blocks), block, 0, stream>>>(
      static_cast<const Unit*>(padded.const_data_ptr()), static_cast<const Offset*>(cu_seqlens.const_data_ptr()),
      static_cast<Unit*>(packed.mutable_data_ptr()), layout.batch, layout.max_length, row_units,
      layout.batch_stride / unit, layout.row_stride / unit, total);
  check_launch(kOp);
}

template <typename Offset>
void pack(const PaddedLayout& layout, const Tensor& padded, const Tensor& cu_seqlens, Tensor& packed) {
  // The widest unit that divides every address and stride the kernel will form.
  const auto bits = reinterpret_cast<uintptr_t>(padded.const_data_ptr()) |
                    reinterpret_cast<uintptr_t>(packed.const_data_ptr()) |
                    static_cast<uintptr_t>(layout.row_bytes | layout.batch_stride | layout.row_stride);
  if (bits % 16 == 0) return launch<uint4, Offset>(layout, padded, cu_seqlens, packed);
  if (bits % 4 == 0) return launch<uint32_t, Offset>(layout, padded, cu_seqlens, packed);
  if (bits % 2 == 0) return launch<uint16_t, Offset>(layout, padded, cu_seqlens, packed);
  launch<uint8_t, Offset>(layout, padded, cu_seqlens, packed);
}

void ragged_pack_out(const Tensor& padded, const Tensor& cu_seqlens, Tensor packed) {
  check_padded_and_offsets(kOp, padded, cu_seqlens);
  check_packed(kOp, padded, packed);
  const auto device = padded.get_device_index();
  ZTOK_CHECK(padded.is_cuda(), kOp, "padded: expected a CUDA tensor");
  ZTOK_CHECK(cu_seqlens.is_cuda() && cu_seqlens.get_device_index() == device, kOp,
             "cu_seqlens: expected a tensor on CUDA device ", device, ", the device of padded");
  ZTOK_CHECK(packed.is_cuda() && packed.get_device_index() == device, kOp,
             "packed: expected a tensor on CUDA device ", device, ", the device of padded");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor rows = with_contiguous_rows(padded);
  const Tensor offsets = torch::stable::contiguous(cu_seqlens);
  const PaddedLayout layout = padded_layout(rows);
  if (packed.size(0) == 0 || layout.row_bytes == 0) return;
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

// The schemas are defined by the CPU library, which is loaded first.
STABLE_TORCH_LIBRARY_IMPL(ztok, CUDA, m) {
  m.impl("ragged_pack_native", TORCH_BOX(&ztok::ragged_pack));
  m.impl("ragged_pack_native_out", TORCH_BOX(&ztok::ragged_pack_out));
}
