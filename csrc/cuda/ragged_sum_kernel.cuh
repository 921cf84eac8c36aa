// Sums of rows by index, in a fixed order: the backward of an indexed gather. Free of any framework but for the
// header-only half types; the bodies are functions of a thread's coordinates, which the tests also run on the host.
//
// The pairs (index, row) are sorted by index, stably, so that rows with one index lie side by side in their order.
// Chunks of kChunkPairs pairs are summed independently, which keeps one often-used index (a separator) from being one
// thread's work. A run of equal indices that lies inside a chunk goes straight to the result; the parts of a run that
// crosses chunks are kept in fp32 and added in order by a second pass. Nothing depends on timing or on the grid.
#pragma once

#include <cstddef>
#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "ragged_kernel.cuh"

namespace ztok {

constexpr int kChunkPairs = 32;
constexpr int kLoadsInFlight = 4;

template <typename T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};

// Columns that one thread sums: 16 bytes of them, or one where an address or a width does not allow that.
template <typename T, int kColumns>
struct alignas(sizeof(T) * kColumns) Columns {
  T values[kColumns];
};

// The machine type of that many bytes. Compilers move a struct of halves in halves.
template <size_t kBytes>
struct Machine;
template <>
struct Machine<2> {
  using type = unsigned short;
};
template <>
struct Machine<4> {
  using type = unsigned int;
};
template <>
struct Machine<8> {
  using type = uint2;
};
template <>
struct Machine<16> {
  using type = uint4;
};

template <typename T, int kColumns>
union Bits {
  Columns<T, kColumns> columns;
  typename Machine<sizeof(T) * kColumns>::type machine;
  ZTOK_HD Bits() : columns{} {}
};

template <typename T, int kColumns>
ZTOK_HD Columns<T, kColumns> load_columns(const T* address) {
  Bits<T, kColumns> bits;
  bits.machine = load(reinterpret_cast<const decltype(bits.machine)*>(address));
  return bits.columns;
}

template <typename T, int kColumns>
ZTOK_HD void store_columns(T* address, const Columns<T, kColumns>& columns) {
  Bits<T, kColumns> bits;
  bits.columns = columns;
  auto* target = reinterpret_cast<decltype(bits.machine)*>(address);
#ifdef __CUDA_ARCH__
  __stwb(target, bits.machine);  // an ordinary store; assigned, it is split into one per column
#else
  *target = bits.machine;
#endif
}

// Sorted pairs and the rows they name. Pairs whose index is num_rows or more (slack, bad input) come last and are not
// summed; their row numbers are still inside the rows.
template <typename T, typename Number>
struct SortedRows {
  const T* rows;
  int64_t row_stride;
  int64_t width;
  const Number* index;
  const Number* row;
  int64_t num_pairs;
  int64_t num_rows;  // of the result

  ZTOK_HD int64_t num_chunks() const { return (num_pairs + kChunkPairs - 1) / kChunkPairs; }
  ZTOK_HD int64_t begin(int64_t chunk) const { return chunk * kChunkPairs; }
  ZTOK_HD int64_t end(int64_t chunk) const {
    const int64_t end = begin(chunk) + kChunkPairs;
    return end < num_pairs ? end : num_pairs;
  }
  ZTOK_HD bool comes_from_before(int64_t chunk) const {
    return begin(chunk) > 0 && index[begin(chunk) - 1] == index[begin(chunk)];
  }
  ZTOK_HD bool goes_on_after(int64_t chunk) const {
    return end(chunk) < num_pairs && index[end(chunk)] == index[end(chunk) - 1];
  }
};

// First pass, one thread per chunk and group of columns. `heads` and `tails` [chunks, width]: the sum of the run that
// comes from the chunk before, and of the run that goes on in the next one. A run that does both is a head.
template <typename T, int kColumns, typename Number>
ZTOK_HD void sum_chunk(const SortedRows<T, Number>& sorted, int64_t chunk, int64_t column, T* out,
                       typename AccumulateIn<T>::type* heads, typename AccumulateIn<T>::type* tails) {
  using Sum = typename AccumulateIn<T>::type;
  Sum sums[kColumns] = {};
  const int64_t end = sorted.end(chunk);
  bool head = sorted.comes_from_before(chunk);
  for (int64_t first = sorted.begin(chunk); first < end; first += kLoadsInFlight) {
    Columns<T, kColumns> loaded[kLoadsInFlight];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int64_t pair = first + j < end ? first + j : end - 1;
      loaded[j] =
          load_columns<T, kColumns>(sorted.rows + static_cast<int64_t>(sorted.row[pair]) * sorted.row_stride + column);
    }
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int64_t pair = first + j;
      if (pair >= end) break;
      const int64_t index = static_cast<int64_t>(sorted.index[pair]);
      if (index >= sorted.num_rows) return;
      for (int c = 0; c < kColumns; ++c) sums[c] += static_cast<Sum>(loaded[j].values[c]);
      const bool last = pair + 1 == end;
      if (!last && static_cast<int64_t>(sorted.index[pair + 1]) == index) continue;
      if (head || (last && sorted.goes_on_after(chunk))) {
        Sum* part = (head ? heads : tails) + chunk * sorted.width + column;
        for (int c = 0; c < kColumns; ++c) part[c] = sums[c];
      } else {
        Columns<T, kColumns> result;
        for (int c = 0; c < kColumns; ++c) result.values[c] = static_cast<T>(sums[c]);
        store_columns(out + index * sorted.width + column, result);
      }
      for (int c = 0; c < kColumns; ++c) sums[c] = 0;
      head = false;
    }
  }
}

// Second pass, one thread per chunk and column: the chunk where a run that crosses chunks begins adds up its parts.
template <typename T, typename Number>
ZTOK_HD void join_chunks(const SortedRows<T, Number>& sorted, int64_t chunk, int64_t column, T* out,
                         const typename AccumulateIn<T>::type* heads, const typename AccumulateIn<T>::type* tails) {
  const Number index = sorted.index[sorted.end(chunk) - 1];
  if (static_cast<int64_t>(index) >= sorted.num_rows || !sorted.goes_on_after(chunk)) return;
  if (sorted.index[sorted.begin(chunk)] == index && sorted.comes_from_before(chunk)) return;
  auto sum = tails[chunk * sorted.width + column];
  // Sorted: the run goes on as long as the pair after a chunk is still its own.
  int64_t next = sorted.end(chunk);
  const auto* head = heads + (chunk + 1) * sorted.width + column;
  do {
    sum += *head;
    head += sorted.width;
    next += kChunkPairs;
  } while (next < sorted.num_pairs && sorted.index[next] == index);
  out[static_cast<int64_t>(index) * sorted.width + column] = static_cast<T>(sum);
}

#ifdef __CUDACC__
constexpr int kSumThreads = 256;

// blockDim = (columns / kColumns, chunks); further columns by the loop.
template <typename T, int kColumns, typename Number>
__global__ void __launch_bounds__(kSumThreads, 4)
    sum_chunks_kernel(const __grid_constant__ SortedRows<T, Number> sorted, T* __restrict__ out,
                      typename AccumulateIn<T>::type* __restrict__ heads,
                      typename AccumulateIn<T>::type* __restrict__ tails) {
  const int64_t chunks = sorted.num_chunks(), step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; chunk < chunks; chunk += step) {
    for (int64_t column = threadIdx.x * kColumns; column < sorted.width; column += blockDim.x * kColumns) {
      sum_chunk<T, kColumns>(sorted, chunk, column, out, heads, tails);
    }
  }
}

template <typename T, typename Number>
__global__ void __launch_bounds__(kSumThreads, 4)
    join_chunks_kernel(const __grid_constant__ SortedRows<T, Number> sorted, T* __restrict__ out,
                       const typename AccumulateIn<T>::type* __restrict__ heads,
                       const typename AccumulateIn<T>::type* __restrict__ tails) {
  const int64_t chunks = sorted.num_chunks(), step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; chunk < chunks; chunk += step) {
    for (int64_t column = threadIdx.x; column < sorted.width; column += blockDim.x) {
      join_chunks(sorted, chunk, column, out, heads, tails);
    }
  }
}
#endif

// The pair of a source's row k before sorting: the index it is summed into, num_rows for none, and the row of `rows`
// that holds it. With `layout` null the rows are the source's own, otherwise those of the gathered batch.
template <typename Number>
ZTOK_HD void make_pair(const Interleave* layout, int source, const Indices& indices, int64_t k, int64_t total,
                       int64_t num_rows, Number* index, Number* row) {
  const bool slack = layout && layout->is_slack(source, k);
  const int64_t wanted = slack ? num_rows : indices[k];
  index[k] = static_cast<Number>(wanted < 0 || wanted > num_rows ? num_rows : wanted);
  row[k] = static_cast<Number>(layout ? layout->destination(source, k, total) : k);
}

#ifdef __CUDACC__
template <typename Number, bool kGathered>
__global__ void __launch_bounds__(kSumThreads, 4)
    make_pairs_kernel(const __grid_constant__ Interleave layout, int source, Indices indices, int64_t num_pairs,
                      int64_t total, int64_t num_rows, Number* __restrict__ index, Number* __restrict__ row) {
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; k < num_pairs;
       k += static_cast<int64_t>(gridDim.x) * kSumThreads) {
    make_pair(kGathered ? &layout : nullptr, source, indices, k, total, num_rows, index, row);
  }
}
#endif

}  // namespace ztok
