// Index arithmetic of the ragged ops, one source for CPU threads, GPU threads and the tests that run the GPU kernels'
// bodies on the host. All of it in 64 bits: totals above 2^31 are valid. Offsets on a GPU are not known to be valid, so
// whatever is computed from them is brought back inside the tensors before it is used as an address.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ZTOK_HD __host__ __device__ __forceinline__
#else
#define ZTOK_HD inline
#endif

namespace ztok {

// An int32 or int64 array. Reading through it costs a predicate; an instantiation per dtype of every offset and index
// would cost dozens of kernels.
struct Indices {
  const void* data;
  bool wide;

  ZTOK_HD int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Last sequence of [0, batch) that starts at or before the row, 0 if none does; batch >= 1. `starts` is any function
// of the sequence. With empty sequences this is the one that holds the row, because they start where the next one does.
template <typename Starts>
ZTOK_HD int64_t sequence_of(const Starts& starts, int64_t batch, int64_t row) {
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (starts(middle) <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

constexpr int kMaxSources = 8;  // of one launch; more of them take several

// How several sources make one packed batch: sequence b is source 0's sequence b, then source 1's and so on. Since all
// offsets begin at 0, the merged offsets are the sums of the sources' offsets, and no scan is needed anywhere.
struct Interleave {
  Indices cu_seqlens[kMaxSources];
  int64_t totals[kMaxSources];  // rows each source has room for; those past its last offset are slack
  int count;
  int64_t batch;
  // [batch + 1] sums of the offsets of the sources of earlier and of later launches; null without any
  const int64_t* before;
  const int64_t* after;
  int64_t rows_before;  // sum of the totals of the sources of earlier launches

  // merged cu_seqlens[b]
  ZTOK_HD int64_t start(int64_t b) const {
    int64_t sum = (before ? before[b] : 0) + (after ? after[b] : 0);
    for (int i = 0; i < count; ++i) sum += cu_seqlens[i][b];
    return sum;
  }

  struct Place {
    int64_t sequence;  // -1: the row is slack
    int64_t position;  // in the sequence
  };

  ZTOK_HD Place place_of(int64_t out_row) const {
    if (batch == 0 || out_row >= start(batch)) return {-1, 0};
    const int64_t sequence = sequence_of([this](int64_t b) { return start(b); }, batch, out_row);
    const int64_t position = out_row - start(sequence);
    return {sequence, position > 0 ? position : 0};
  }

  struct Origin {
    int source;   // in this launch; -1: the row comes from a source of another launch
    int64_t row;  // of the source, inside [0, totals[source])
  };

  ZTOK_HD Origin origin_of(const Place& place) const {
    int64_t left = place.position;
    if (before) left -= before[place.sequence + 1] - before[place.sequence];
    for (int i = 0; i < count && left >= 0; ++i) {
      const int64_t begin = cu_seqlens[i][place.sequence];
      const int64_t length = cu_seqlens[i][place.sequence + 1] - begin;
      if (left < length) {
        const int64_t row = begin + left;
        return {row >= 0 && row < totals[i] ? i : -1, row};
      }
      left -= length;
    }
    return {-1, 0};
  }

  ZTOK_HD bool is_slack(int source, int64_t row) const { return row >= cu_seqlens[source][batch]; }

  // Output row of a source's row. Slack rows follow the last sequence, in order of the sources, so that over all
  // sources the destinations are a permutation of [0, total).
  ZTOK_HD int64_t destination(int source, int64_t row, int64_t total) const {
    // Rows before this one in the output: of this source `row`; of earlier sources those of the sequences up to and
    // with this one; of later sources those of the sequences before this one.
    const bool slack = is_slack(source, row);
    int64_t sequence = batch, next = batch, out = row;
    if (slack) {
      out = start(batch) + rows_before - (before ? before[batch] : 0) + row - cu_seqlens[source][batch];
      for (int i = 0; i < source; ++i) out += totals[i] - cu_seqlens[i][batch];
    } else {
      const Indices& own = cu_seqlens[source];
      sequence = sequence_of([&own](int64_t b) { return own[b]; }, batch, row);
      next = sequence + 1;
      out += (before ? before[next] : 0) + (after ? after[sequence] : 0);
      for (int i = 0; i < count; ++i) {
        if (i != source) out += cu_seqlens[i][i < source ? next : sequence];
      }
    }
    return out < 0 ? 0 : (out < total ? out : total - 1);
  }
};

}  // namespace ztok
