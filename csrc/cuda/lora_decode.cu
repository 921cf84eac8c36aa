// lora_linear on CUDA for at most 64 rows: decode, bound by reading the weight. The op sends more rows to another
// backend.
//
// Reads the weight once, B once per group of rows that share an adapter, A once per 8 rows. Rows of x and weight are
// read in place whatever the distance between them; strided elements are copied. Scratch: M r floats and, for layers
// too narrow to occupy the device, up to 16 partial sums of the result in float32. No host synchronisation: safe inside
// a CUDA graph. The kernels and their reasons are in lora_decode_shrink.cuh, lora_decode_base.cuh and
// lora_decode_kernel.cuh.
#include <optional>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "check.h"
#include "lora_decode_kernel.cuh"
#include "new_tensor.h"
#include "stream.h"

namespace ztok {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "lora_linear";

bool on_16_bytes(const void* address, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(address) | static_cast<uintptr_t>(row_bytes)) % 16 == 0;
}

void check_cuda(cudaError_t error, const char* what) {
  ZTOK_CHECK(error == cudaSuccess, kOp, what, ": ", cudaGetErrorString(error));
}

// Rows are read in place whatever their stride; only rows that are themselves strided are copied first.
Tensor with_dense_rows(const Tensor& t) {
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// The second kernel begins while the first runs, where both ends of that agreement are in its machine code: code made
// for an earlier architecture has no wait in it.
bool may_overlap(const void* kernel) {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "kernel attributes");
  return attributes.ptxVersion >= 90;
}

template <typename T, typename AdapterT>
void launch_shrink(const LoraDecode& d, int64_t tiles, cudaStream_t stream) {
  const bool aligned = on_16_bytes(d.x, d.x_stride * sizeof(T)) && on_16_bytes(d.A, d.in * sizeof(AdapterT)) &&
                       d.in % Vector<T>::kSize == 0;
  const int64_t blocks = d.num_adapters * ceil_div(d.rank, kShrinkRanks);
  ZTOK_CHECK(blocks <= 0x7fffffff, kOp, "A: expected at most 2^31 groups of 4 ranks, got ", blocks);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(d.rows, kShrinkRows)));
  const auto kernel = aligned ? lora_shrink_kernel<T, AdapterT, true> : lora_shrink_kernel<T, AdapterT, false>;
  kernel<<<grid, 32 * kLoraWarps, 0, stream>>>(d, tiles);
  check_launch(kOp);
}

template <typename T, int kRowTiles, bool kAligned>
void launch(LoraDecode d, const Tensor& x, int32_t device, cudaStream_t stream) {
  using Shape = LoraShape<sizeof(T) == 2, kRowTiles>;
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  const LoraPlan plan = lora_plan<Shape>(d.rows, d.in, d.out, d.rank, multiprocessors);
  const Tensor scratch = new_tensor(x, {plan.scratch_floats}, ScalarType::Float);
  place_scratch(d, plan, static_cast<float*>(scratch.mutable_data_ptr()));
  if (d.float_adapters) {
    launch_shrink<T, float>(d, plan.tiles, stream);
  } else {
    launch_shrink<T, T>(d, plan.tiles, stream);
  }

  const auto kernel = lora_decode_kernel<T, kRowTiles, kAligned>;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits));
  config.blockDim = dim3(32 * kLoraWarps);
  config.dynamicSmemBytes = Shape::kSharedBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = may_overlap(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
  const int64_t steps = ceil_div(d.in, Shape::kChunk * Shape::kChunksPerStep);
  check_cuda(cudaLaunchKernelEx(&config, kernel, d, steps, plan.steps_per_split), "CUDA refused the launch");
}

template <typename T>
void dispatch_rows(const LoraDecode& d, const Tensor& x, int32_t device, cudaStream_t stream) {
  const bool aligned = on_16_bytes(d.x, d.x_stride * sizeof(T)) && on_16_bytes(d.weight, d.weight_stride * sizeof(T)) &&
                       d.in % Vector<T>::kSize == 0;
  if (!aligned) return launch<T, 8, false>(d, x, device, stream);
  if (d.rows <= 8) return launch<T, 1, true>(d, x, device, stream);
  if constexpr (sizeof(T) == 2) {  // float32 is not what models decode in: fewer kernels, a smaller library
    if (d.rows <= 16) return launch<T, 2, true>(d, x, device, stream);
    if (d.rows <= 32) return launch<T, 4, true>(d, x, device, stream);
  }
  launch<T, 8, true>(d, x, device, stream);
}

void check_on_device(const char* name, const Tensor& t, int32_t device) {
  ZTOK_CHECK(t.is_cuda() && t.get_device_index() == device, kOp, name, ": expected a tensor on CUDA device ", device,
             ", the device of x");
}

// Shapes and dtypes are checked by the op that calls this; here is what would make the kernels read out of bounds.
void check_arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& A,
                     const Tensor& B, const Tensor& scaling) {
  ZTOK_CHECK(x.dim() == 2, kOp, "x: expected [M, in], got ", x.dim(), " dimensions");
  // torch.ops.ztok.lora_linear comes here with any number of rows; the public op does not.
  ZTOK_CHECK(x.size(0) <= kLoraMaxRows, kOp, "x: this kernel takes at most ", kLoraMaxRows, " rows, got ", x.size(0),
             "; ztok_fast.ops.lora_linear and torch.ops.ztok.lora_linear.backend choose another for more");
  ZTOK_CHECK(x.is_cuda(), kOp, "x: expected a CUDA tensor");
  ZTOK_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.scalar_type() == x.scalar_type(), kOp,
             "weight: expected [out, in] of the width and dtype of x");
  ZTOK_CHECK(A.dim() == 3 && A.numel() > 0 && A.size(2) == x.size(1), kOp, "A: expected [n, r, in], not empty");
  ZTOK_CHECK(B.dim() == 3 && B.size(0) == A.size(0) && B.size(1) == weight.size(0) && B.size(2) == A.size(1), kOp,
             "B: expected [n, out, r] for the A that came");
  ZTOK_CHECK((A.scalar_type() == x.scalar_type() || A.scalar_type() == ScalarType::Float) &&
                 B.scalar_type() == A.scalar_type(),
             kOp, "A, B: expected the dtype of x or float32");
  ZTOK_CHECK(scaling.dim() == 1 && scaling.size(0) == A.size(0) && scaling.scalar_type() == ScalarType::Float, kOp,
             "scaling: expected float32 [n]");
  ZTOK_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == x.scalar_type()),
             kOp, "bias: expected [out] of the dtype of x");
  const int32_t device = x.get_device_index();
  check_on_device("weight", weight, device);
  check_on_device("A", A, device);
  check_on_device("B", B, device);
  check_on_device("scaling", scaling, device);
  if (bias) check_on_device("bias", *bias, device);
}

Tensor lora_decode(const Tensor& x_, const Tensor& weight_, const std::optional<Tensor>& bias_, const Tensor& A_,
                   const Tensor& B_, const Tensor& scaling_, const std::optional<Tensor>& adapters_,
                   const std::optional<Tensor>& cu_seqlens_) {
  check_arguments(x_, weight_, bias_, A_, B_, scaling_);
  const int32_t device = x_.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor x = with_dense_rows(x_), weight = with_dense_rows(weight_);
  const Tensor A = torch::stable::contiguous(A_), B = torch::stable::contiguous(B_);
  const Tensor scaling = torch::stable::contiguous(scaling_);
  const Tensor y = new_tensor(x, {x.size(0), weight.size(0)});
  if (y.numel() == 0) return y;

  LoraDecode d = {};
  d.x = x.const_data_ptr();
  d.x_stride = x.stride(0);
  d.weight = weight.const_data_ptr();
  d.weight_stride = weight.stride(0);
  d.A = A.const_data_ptr();
  d.B = B.const_data_ptr();
  d.float_adapters = A.scalar_type() == ScalarType::Float;
  d.rank = static_cast<int>(A.size(1));
  d.aligned_B = on_16_bytes(d.B, 0) && d.rank % 8 == 0;
  d.scaling = static_cast<const float*>(scaling.const_data_ptr());
  d.rows = static_cast<int>(x.size(0));
  d.num_adapters = static_cast<int>(A.size(0));
  d.in = x.size(1);
  d.out = weight.size(0);
  d.y = y.mutable_data_ptr();
  std::optional<Tensor> bias, adapters, cu_seqlens;  // hold the contiguous copies until the launches
  if (bias_) d.bias = bias.emplace(torch::stable::contiguous(*bias_)).const_data_ptr();
  if (adapters_) {
    check_on_device("adapters", *adapters_, device);
    ZTOK_CHECK(adapters_->dim() == 1 && adapters_->scalar_type() == ScalarType::Int, kOp, "adapters: expected int32");
    adapters.emplace(torch::stable::contiguous(*adapters_));
    d.adapters = static_cast<const int32_t*>(adapters->const_data_ptr());
    ZTOK_CHECK(cu_seqlens_ || adapters->size(0) == d.rows, kOp, "adapters: expected one per row of x");
  }
  if (cu_seqlens_) {
    check_on_device("cu_seqlens", *cu_seqlens_, device);
    d.wide_offsets = cu_seqlens_->scalar_type() == ScalarType::Long;
    ZTOK_CHECK(adapters_ && cu_seqlens_->dim() == 1 && cu_seqlens_->size(0) == adapters->size(0) + 1 &&
                   (d.wide_offsets || cu_seqlens_->scalar_type() == ScalarType::Int),
               kOp, "cu_seqlens: expected int32 or int64 [B + 1] for the B adapters");
    d.cu_seqlens = cu_seqlens.emplace(torch::stable::contiguous(*cu_seqlens_)).const_data_ptr();
    d.sequences = adapters->size(0);
  }
  const cudaStream_t stream = current_stream(device);
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      dispatch_rows<__nv_bfloat16>(d, x, device, stream);
      break;
    case ScalarType::Half:
      dispatch_rows<__half>(d, x, device, stream);
      break;
    case ScalarType::Float:
      dispatch_rows<float>(d, x, device, stream);
      break;
    default:
      fail(kOp, "x: expected float16, bfloat16 or float32");
  }
  return y;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CUDA, m) { m.impl("lora_linear", TORCH_BOX(&ztok::lora_decode)); }
