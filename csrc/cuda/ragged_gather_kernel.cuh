// Gather from several sources, its layout, and the copies of its backward. See ragged_kernel.cuh for the copying.
#pragma once

#include "ragged_kernel.cuh"

namespace ztok {

// int32 or int64, to be written.
struct MutableIndices {
  void* data;
  bool wide;

  ZTOK_HD void set(int64_t i, int64_t value) const {
    if (wide) {
      static_cast<int64_t*>(data)[i] = value;
    } else {
      static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
    }
  }
};

// Output rows of a gather: one launch over up to kMaxSources sources. Of several launches each writes the rows of its
// own sources and nothing else, and the first also writes the position ids.
template <typename Unit>
struct GatherRows {
  Interleave layout;
  const Unit* tables[kMaxSources];
  int64_t table_rows[kMaxSources];
  int64_t table_strides[kMaxSources];
  Indices indices[kMaxSources];  // data null: the table's own rows in order
  int64_t* position_ids;         // null: not written

  ZTOK_HD const Unit* find(int64_t row, bool holds_first_unit) const {
    const Interleave::Place place = layout.place_of(row);
    if (position_ids && holds_first_unit) position_ids[row] = place.position;
    const Unit* other = layout.before || layout.after ? untouched<Unit>() : filled<Unit>();
    if (place.sequence < 0) return other;
    const Interleave::Origin origin = layout.origin_of(place);
    if (origin.source < 0) return other;
    const int64_t table_row = indices[origin.source].data ? indices[origin.source][origin.row] : origin.row;
    if (table_row < 0 || table_row >= table_rows[origin.source]) return filled<Unit>();
    return tables[origin.source] + table_row * table_strides[origin.source];
  }
};

// Backward of a source that takes a table's own rows: its gradient rows in the order of the table, zero for slack.
template <typename Unit>
struct ReturnRows {
  Interleave layout;
  int source;
  const Unit* grad;
  int64_t total, row_stride;

  ZTOK_HD const Unit* find(int64_t row, bool) const {
    if (layout.is_slack(source, row)) return filled<Unit>();
    return grad + layout.destination(source, row, total) * row_stride;
  }
};

// One entry of everything that a layout consists of. `i` runs over max(total, batch + 1); null pointers are left out.
ZTOK_HD void layout_entry(const Interleave& layout, int64_t i, int64_t total, const MutableIndices& merged,
                          int64_t* position_ids, int64_t* destinations) {
  if (merged.data && i <= layout.batch) merged.set(i, layout.start(i));
  if (i >= total) return;
  if (position_ids) position_ids[i] = layout.place_of(i).position;
  if (!destinations) return;
  int64_t row = i - layout.rows_before;
  if (row < 0) return;
  for (int source = 0; source < layout.count; ++source) {
    if (row < layout.totals[source]) {
      destinations[i] = layout.destination(source, row, total);
      return;
    }
    row -= layout.totals[source];
  }
}

// One entry of the running sums that join the launches of a gather from more than kMaxSources sources.
ZTOK_HD void add_offsets_entry(const Interleave& layout, int64_t b, int64_t sign, int64_t* sums) {
  for (int i = 0; i < layout.count; ++i) sums[b] += sign * layout.cu_seqlens[i][b];
}

#ifdef __CUDACC__
__global__ void __launch_bounds__(kThreads, 4)
    layout_kernel(const __grid_constant__ Interleave layout, int64_t total, MutableIndices merged,
                  int64_t* position_ids, int64_t* destinations) {
  const int64_t entries = total > layout.batch + 1 ? total : layout.batch + 1;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < entries;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    layout_entry(layout, i, total, merged, position_ids, destinations);
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    add_offsets_kernel(const __grid_constant__ Interleave layout, int64_t sign, int64_t* sums) {
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b <= layout.batch;
       b += static_cast<int64_t>(gridDim.x) * kThreads) {
    add_offsets_entry(layout, b, sign, sums);
  }
}
#endif

}  // namespace ztok
