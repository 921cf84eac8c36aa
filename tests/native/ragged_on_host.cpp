// The bodies of the ragged CUDA kernels, run on the host: blocks and threads one after another, a block's halves as the
// barrier between them orders them. Compiled and called by tests/native/test_ragged_on_host.py.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "faults.h"
#include "ragged_gather_kernel.cuh"
#include "ragged_sum_kernel.cuh"

namespace {

using namespace ztok;

template <typename Unit, typename Locator>
void copy_rows(const Locator& locator, void* out, int64_t rows, int64_t row_bytes, const void* fill) {
  const auto row_units = static_cast<uint32_t>(row_bytes / sizeof(Unit));
  if (rows == 0 || row_units == 0) return;
  Fill<Unit> pattern{};
  if (fill) std::memcpy(&pattern, fill, sizeof(pattern));
  const Unit* sources[kTileRows];
  for (int64_t i = 0; i < num_tiles(rows, row_units); ++i) {
    const Tile tile = tile_at(i, rows, row_units);
    if (tile.rows > kTileRows) std::abort();
    std::fill(sources, sources + kTileRows, untouched<Unit>());
    for (int thread = 0; thread < kThreads; ++thread) locate_rows(tile, thread, locator, sources);
    for (int thread = 0; thread < kThreads; ++thread) {
      copy_units(tile, thread, sources, static_cast<Unit*>(out), row_units, pattern);
    }
  }
}

template <typename F>
void with_unit(int64_t bytes, const F& f) {
  if (bytes == 16) return f(uint4{});
  if (bytes == 8) return f(uint2{});
  if (bytes == 4) return f(uint32_t{});
  if (bytes == 2) return f(uint16_t{});
  f(uint8_t{});
}

// Parameters of one source, as Python fills them in.
struct SourceArguments {
  const void* table;
  int64_t table_rows, table_stride;  // bytes
  const void* index;
  int64_t index_wide;
  const void* cu_seqlens;
  int64_t cu_wide, total;
};

// One group of sources, with the sums over the others that the library keeps on the device.
struct Group {
  std::vector<int64_t> before, after;
  Interleave layout{};

  Group(const SourceArguments* sources, int64_t count, int64_t batch, int64_t first)
      : before(batch + 1), after(batch + 1) {
    const int64_t end = std::min<int64_t>(count, first + kMaxSources);
    layout.batch = batch;
    for (int64_t i = 0; i < count; ++i) {
      const Indices cu{sources[i].cu_seqlens, sources[i].cu_wide != 0};
      if (i >= first && i < end) {
        layout.cu_seqlens[layout.count] = cu;
        layout.totals[layout.count++] = sources[i].total;
        continue;
      }
      if (i < first) layout.rows_before += sources[i].total;
      Interleave one{};
      one.cu_seqlens[0] = cu;
      one.count = 1;
      for (int64_t b = 0; b <= batch; ++b) add_offsets_entry(one, b, 1, (i < first ? before : after).data());
    }
    if (count > kMaxSources) {
      layout.before = before.data();
      layout.after = after.data();
    }
  }
};

template <typename T, typename Number>
void sum_rows(const Interleave* layout, int source, const Indices& index, int64_t count, const void* rows,
              int64_t row_stride, int64_t total, int64_t width, int64_t num_rows, bool wide, void* out) {
  using Sum = typename AccumulateIn<T>::type;
  std::vector<Number> keys(count), values(count), sorted_keys, sorted_values;
  for (int64_t k = 0; k < count; ++k) {
    make_pair(layout, source, index, k, total, num_rows, keys.data(), values.data());
  }
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
  for (const int64_t k : order) {
    sorted_keys.push_back(keys[k]);
    sorted_values.push_back(values[k]);
  }
  const SortedRows<T, Number> sorted{static_cast<const T*>(rows), row_stride, width,   sorted_keys.data(),
                                     sorted_values.data(),        count,      num_rows};
  const int64_t chunks = sorted.num_chunks();
  std::vector<Sum> heads(chunks * width), tails(chunks * width);
  auto* result = static_cast<T*>(out);
  constexpr int kWide = 16 / sizeof(T);
  for (int64_t chunk = chunks; chunk-- > 0;) {  // the order of chunks must not matter
    for (int64_t column = 0; column < width; column += wide ? kWide : 1) {
      wide ? sum_chunk<T, kWide>(sorted, chunk, column, result, heads.data(), tails.data())
           : sum_chunk<T, 1>(sorted, chunk, column, result, heads.data(), tails.data());
    }
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t column = 0; column < width; ++column) {
      join_chunks(sorted, chunk, column, result, heads.data(), tails.data());
    }
  }
}

template <typename T>
void sum_rows_of(bool narrow, const Interleave* layout, int source, const Indices& index, int64_t count,
                 const void* rows, int64_t row_stride, int64_t total, int64_t width, int64_t num_rows, bool wide,
                 void* out) {
  (narrow ? sum_rows<T, uint32_t> : sum_rows<T, uint64_t>)(layout, source, index, count, rows, row_stride, total, width,
                                                           num_rows, wide, out);
}

// Where the last call went out of bounds, which ended it; 0 if it did not.
uint64_t fault = 0;

template <typename F>
void guarded(const F& f) {
  fault = ztok::host::faulting_address(f);
}

}  // namespace

extern "C" {

uint64_t host_fault() { return fault; }

void host_pack(const void* padded, const void* cu_seqlens, int64_t cu_wide, int64_t batch, int64_t max_length,
               int64_t batch_stride, int64_t row_stride, void* packed, int64_t total, int64_t row_bytes,
               int64_t unit_bytes) {
  guarded([&] {
    with_unit(unit_bytes, [&](auto unit) {
      using Unit = decltype(unit);
      const int64_t size = sizeof(Unit);
      const PackRows<Unit> locator{static_cast<const Unit*>(padded),
                                   {cu_seqlens, cu_wide != 0},
                                   batch,
                                   max_length,
                                   batch_stride / size,
                                   row_stride / size};
      copy_rows<Unit>(locator, packed, total, row_bytes, nullptr);
    });
  });
}

void host_unpack(const void* packed, const void* cu_seqlens, int64_t cu_wide, int64_t total, int64_t row_stride,
                 void* padded, int64_t batch, int64_t max_length, int64_t row_bytes, const void* fill,
                 int64_t unit_bytes) {
  guarded([&] {
    with_unit(unit_bytes, [&](auto unit) {
      using Unit = decltype(unit);
      const int64_t size = sizeof(Unit);
      const UnpackRows<Unit> locator{
          static_cast<const Unit*>(packed), {cu_seqlens, cu_wide != 0}, total, max_length, row_stride / size};
      copy_rows<Unit>(locator, padded, batch * max_length, row_bytes, fill);
    });
  });
}

void host_gather(const SourceArguments* sources, int64_t count, int64_t batch, int64_t total, int64_t row_bytes,
                 int64_t unit_bytes, void* values, int64_t* position_ids) {
  guarded([&] {
    for (int64_t first = 0; first < count; first += kMaxSources) {
      const Group group(sources, count, batch, first);
      with_unit(unit_bytes, [&](auto unit) {
        using Unit = decltype(unit);
        GatherRows<Unit> locator{};
        locator.layout = group.layout;
        locator.position_ids = first == 0 ? position_ids : nullptr;
        for (int i = 0; i < group.layout.count; ++i) {
          const SourceArguments& source = sources[first + i];
          locator.tables[i] = static_cast<const Unit*>(source.table);
          locator.table_rows[i] = source.table_rows;
          locator.table_strides[i] = source.table_stride / static_cast<int64_t>(sizeof(Unit));
          locator.indices[i] = {source.index, source.index_wide != 0};
        }
        copy_rows<Unit>(locator, values, total, row_bytes, nullptr);
      });
    }
  });
}

void host_layout(const SourceArguments* sources, int64_t count, int64_t batch, int64_t total, void* merged,
                 int64_t merged_wide, int64_t* position_ids, int64_t* destinations) {
  guarded([&] {
    for (int64_t first = 0; first < count; first += kMaxSources) {
      const Group group(sources, count, batch, first);
      const MutableIndices offsets{first == 0 ? merged : nullptr, merged_wide != 0};
      for (int64_t i = 0; i < std::max(total, batch + 1); ++i) {
        layout_entry(group.layout, i, total, offsets, first == 0 ? position_ids : nullptr, destinations);
      }
    }
  });
}

void host_return_rows(const SourceArguments* sources, int64_t count, int64_t batch, int64_t source, const void* grad,
                      int64_t total, int64_t row_stride, int64_t row_bytes, int64_t unit_bytes, void* out) {
  guarded([&] {
    const Group group(sources, count, batch, source / kMaxSources * kMaxSources);
    with_unit(unit_bytes, [&](auto unit) {
      using Unit = decltype(unit);
      const ReturnRows<Unit> locator{group.layout, static_cast<int>(source % kMaxSources),
                                     static_cast<const Unit*>(grad), total,
                                     row_stride / static_cast<int64_t>(sizeof(Unit))};
      copy_rows<Unit>(locator, out, sources[source].total, row_bytes, nullptr);
    });
  });
}

// `type`: 0 float, 1 double, 2 half, 3 bfloat16. With `count` 0 the rows are summed in their own order.
void host_sum(int64_t type, int64_t narrow, int64_t wide, const SourceArguments* sources, int64_t count, int64_t batch,
              int64_t source, const void* index, int64_t index_wide, int64_t num_pairs, const void* rows,
              int64_t row_stride, int64_t total, int64_t width, int64_t num_rows, void* out) {
  guarded([&] {
    const auto sum = type == 0   ? sum_rows_of<float>
                     : type == 1 ? sum_rows_of<double>
                     : type == 2 ? sum_rows_of<c10::Half>
                                 : sum_rows_of<c10::BFloat16>;
    const Indices indices{index, index_wide != 0};
    if (count == 0) {
      return sum(narrow != 0, nullptr, 0, indices, num_pairs, rows, row_stride, total, width, num_rows, wide != 0, out);
    }
    const Group group(sources, count, batch, source / kMaxSources * kMaxSources);
    sum(narrow != 0, &group.layout, static_cast<int>(source % kMaxSources), indices, num_pairs, rows, row_stride, total,
        width, num_rows, wide != 0, out);
  });
}

// ---- addresses that no machine of a test has memory for: what a locator says of a row, in bytes from `base`

int64_t address_in_padded(const void* cu_seqlens, int64_t batch, int64_t max_length, int64_t batch_stride,
                          int64_t row_stride, int64_t row) {
  const auto* base = reinterpret_cast<const uint4*>(uintptr_t{1} << 40);
  const PackRows<uint4> locator{base, {cu_seqlens, true}, batch, max_length, batch_stride / 16, row_stride / 16};
  return reinterpret_cast<const char*>(locator.find(row, true)) - reinterpret_cast<const char*>(base);
}

int64_t address_in_packed(const void* cu_seqlens, int64_t total, int64_t max_length, int64_t row_stride, int64_t row) {
  const auto* base = reinterpret_cast<const uint4*>(uintptr_t{1} << 40);
  const UnpackRows<uint4> locator{base, {cu_seqlens, true}, total, max_length, row_stride / 16};
  return reinterpret_cast<const char*>(locator.find(row, true)) - reinterpret_cast<const char*>(base);
}

int64_t destination_of(const SourceArguments* sources, int64_t count, int64_t batch, int64_t source, int64_t row,
                       int64_t total) {
  const Group group(sources, count, batch, source / kMaxSources * kMaxSources);
  return group.layout.destination(static_cast<int>(source % kMaxSources), row, total);
}

// Source and row of an output row, as source * 2^40 + row.
int64_t origin_of(const SourceArguments* sources, int64_t count, int64_t batch, int64_t row) {
  const Group group(sources, count, batch, 0);
  const Interleave::Origin origin = group.layout.origin_of(group.layout.place_of(row));
  return (int64_t{origin.source} << 40) + origin.row;
}

void tile_of(int64_t tile, int64_t rows, int64_t row_units, int64_t* result) {
  const Tile found = tile_at(tile, rows, static_cast<uint32_t>(row_units));
  result[0] = found.first;
  result[1] = found.first_row;
  result[2] = found.first_unit;
  result[3] = found.units;
  result[4] = found.rows;
  result[5] = num_tiles(rows, static_cast<uint32_t>(row_units));
}
}
