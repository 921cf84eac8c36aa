// ragged_scatter_add on CUDA. Sorting by CUB (radix sort, stable), sums by ragged_sum_kernel.cuh. No host
// synchronisation: safe inside a CUDA graph.
#include "ragged_sum.h"

#include <cub/device/device_radix_sort.cuh>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "launch.h"
#include "ragged_sum_kernel.cuh"
#include "stream.h"

namespace ztok {
namespace {

constexpr const char* kOp = "ragged_scatter_add";

void check_cuda(const char* op, cudaError_t error) {
  ZTOK_CHECK(error == cudaSuccess, op, "CUDA: ", cudaGetErrorString(error));
}

Tensor scratch(const Tensor& like, int64_t bytes) { return new_tensor(like, {bytes}, ScalarType::Byte); }

// Number of bits that hold values up to `largest`.
int bits_of(uint64_t largest) {
  int bits = 1;
  while (bits < 64 && largest >> bits != 0) ++bits;
  return bits;
}

// Pairs sorted by index, in memory that the tensors own. `Number` is what index and row number are kept in.
template <typename Number>
struct SortedPairs {
  Tensor index, row;

  SortedPairs(const char* op, const Tensor& like, const RowPairs& pairs, int64_t total, int64_t num_rows,
              cudaStream_t stream)
      : index(scratch(like, pairs.count * sizeof(Number))), row(scratch(like, pairs.count * sizeof(Number))) {
    Tensor unsorted_index = scratch(like, pairs.count * sizeof(Number));
    Tensor unsorted_row = scratch(like, pairs.count * sizeof(Number));
    auto* keys = static_cast<Number*>(unsorted_index.mutable_data_ptr());
    auto* values = static_cast<Number*>(unsorted_row.mutable_data_ptr());
    const unsigned blocks = blocks_for(pairs.count, kSumThreads);
    if (pairs.layout) {
      make_pairs_kernel<Number, true><<<blocks, kSumThreads, 0, stream>>>(*pairs.layout, pairs.source, pairs.index,
                                                                          pairs.count, total, num_rows, keys, values);
    } else {
      make_pairs_kernel<Number, false><<<blocks, kSumThreads, 0, stream>>>(Interleave{}, 0, pairs.index, pairs.count,
                                                                           total, num_rows, keys, values);
    }
    check_launch(op);
    size_t bytes = 0;
    const auto sort = [&](void* memory) {
      return cub::DeviceRadixSort::SortPairs(memory, bytes, keys, data(index), values, data(row),
                                             static_cast<Number>(pairs.count), 0,
                                             bits_of(static_cast<uint64_t>(num_rows)), stream);
    };
    check_cuda(op, sort(nullptr));  // asks for the size
    Tensor memory = scratch(like, static_cast<int64_t>(bytes));
    check_cuda(op, sort(memory.mutable_data_ptr()));
  }

  static Number* data(Tensor& tensor) { return static_cast<Number*>(tensor.mutable_data_ptr()); }
};

template <typename T, typename Number>
void launch_sums(const char* op, const Tensor& rows, const RowPairs& pairs, Tensor& sums, cudaStream_t stream) {
  using Sum = typename AccumulateIn<T>::type;
  const SortedPairs<Number> pairs_in_order(op, rows, pairs, rows.size(0), sums.size(0), stream);
  const SortedRows<T, Number> sorted{static_cast<const T*>(rows.const_data_ptr()),
                                     rows.stride(0),
                                     rows.size(1),
                                     static_cast<const Number*>(pairs_in_order.index.const_data_ptr()),
                                     static_cast<const Number*>(pairs_in_order.row.const_data_ptr()),
                                     pairs.count,
                                     sums.size(0)};
  const int64_t chunks = sorted.num_chunks(), part_bytes = chunks * sorted.width * static_cast<int64_t>(sizeof(Sum));
  Tensor head_memory = scratch(rows, part_bytes), tail_memory = scratch(rows, part_bytes);
  auto* heads = static_cast<Sum*>(head_memory.mutable_data_ptr());
  auto* tails = static_cast<Sum*>(tail_memory.mutable_data_ptr());
  auto* out = static_cast<T*>(sums.mutable_data_ptr());

  // As many threads along the columns as there are groups of them, in whole warps or an even part of one; the rest of
  // a block takes further chunks.
  const auto block_for = [&](int64_t groups) {
    unsigned x = 1;
    while (x < groups && x < 32) x *= 2;
    if (groups > 32) x = static_cast<unsigned>(std::min<int64_t>((groups + 31) / 32 * 32, kSumThreads));
    return dim3(x, kSumThreads / x);
  };
  Alignment alignment;
  const auto element = static_cast<int64_t>(sizeof(T));
  alignment.address(sorted.rows).address(out).bytes(sorted.row_stride * element).bytes(sorted.width * element);
  constexpr int kWide = 16 / sizeof(T);
  if (alignment.bits % 16 == 0) {
    const dim3 block = block_for(sorted.width / kWide);
    sum_chunks_kernel<T, kWide, Number><<<blocks_for(chunks, block.y), block, 0, stream>>>(sorted, out, heads, tails);
  } else {
    const dim3 block = block_for(sorted.width);
    sum_chunks_kernel<T, 1, Number><<<blocks_for(chunks, block.y), block, 0, stream>>>(sorted, out, heads, tails);
  }
  check_launch(op);
  const dim3 block = block_for(sorted.width);
  join_chunks_kernel<T, Number><<<blocks_for(chunks, block.y), block, 0, stream>>>(sorted, out, heads, tails);
  check_launch(op);
}

template <typename T>
void sum_rows(const char* op, const Tensor& rows, const RowPairs& pairs, Tensor& sums, cudaStream_t stream) {
  // The largest index stands for none, so it has to fit as well.
  const bool narrow = std::max(rows.size(0), sums.size(0)) < std::numeric_limits<uint32_t>::max();
  narrow ? launch_sums<T, uint32_t>(op, rows, pairs, sums, stream)
         : launch_sums<T, uint64_t>(op, rows, pairs, sums, stream);
}

}  // namespace

void sum_rows_by_index(const char* op, const Tensor& rows, const RowPairs& pairs, Tensor& sums, cudaStream_t stream) {
  const int64_t bytes = sums.size(0) * row_bytes_of(sums, 1);
  if (bytes == 0) return;
  check_cuda(op, cudaMemsetAsync(sums.mutable_data_ptr(), 0, bytes, stream));
  if (pairs.count == 0) return;
  switch (rows.scalar_type()) {
    case ScalarType::Float:
      return sum_rows<float>(op, rows, pairs, sums, stream);
    case ScalarType::Double:
      return sum_rows<double>(op, rows, pairs, sums, stream);
    case ScalarType::Half:
      return sum_rows<c10::Half>(op, rows, pairs, sums, stream);
    case ScalarType::BFloat16:
      return sum_rows<c10::BFloat16>(op, rows, pairs, sums, stream);
    default:
      fail(op, "rows: expected a floating-point dtype, got ", name_of(rows.scalar_type()));
  }
}

namespace {

Tensor ragged_scatter_add(const Tensor& rows, const Tensor& index, int64_t num_rows) {
  ZTOK_CHECK(rows.dim() == 2 && num_rows >= 0, kOp, "expected rows [T, D] and num_rows of at least 0");
  check_indices(kOp, "index", index, "[T]");
  ZTOK_CHECK(index.size(0) == rows.size(0), kOp, "index: expected ", rows.size(0), " values, got ", index.size(0));
  const auto device = rows.get_device_index();
  ZTOK_CHECK(rows.is_cuda() && index.is_cuda() && index.get_device_index() == device, kOp,
             "expected tensors on one CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor sums = new_rows(rows, {num_rows}, 1);
  const Tensor contiguous = as_contiguous(index);
  const RowPairs pairs{indices_of(contiguous), index.size(0), nullptr, 0};
  sum_rows_by_index(kOp, with_contiguous_rows(rows, 1), pairs, sums, current_stream(device));
  return sums;
}

}  // namespace
}  // namespace ztok

STABLE_TORCH_LIBRARY_IMPL(ztok, CUDA, m) { m.impl("ragged_scatter_add", TORCH_BOX(&ztok::ragged_scatter_add)); }
