// Copying rows on the CPU: how work is shared, and stores that leave the cache alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "ragged.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ztok {

constexpr int64_t kBytesPerTask = 1024 * 1024;  // below this waking a second thread costs more than the copy
// Results above this do not stay in the cache anyway: stores that go around it save reading every line before writing.
constexpr int64_t kStreamedBytes = 8 * 1024 * 1024;

// Calls f(begin, end) for ranges of rows [0, rows), split by bytes and not by sequence, so that one long sequence among
// short ones is shared between threads.
template <typename F>
void for_rows(int64_t rows, int64_t row_bytes, const F& f) {
  if (rows == 0) return;
  const int64_t rows_per_task = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(row_bytes, 1));
  torch::stable::parallel_for(0, rows, rows_per_task, f);
}

// A large result is fresh memory of the system: asking for huge pages saves most of its page faults, which take longer
// than the copy. Where the system does not grant them nothing changes.
inline Tensor with_huge_pages(Tensor result) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const int64_t bytes = row_bytes_of(result, 0);
  if (bytes >= kStreamedBytes) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(result.const_data_ptr()) + kPage - 1) / kPage * kPage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(result.const_data_ptr()) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return result;
}

// Writes that a whole range of rows makes. Streamed stores become visible to other threads at the latest when the
// writer is destroyed.
class RowWriter {
 public:
  explicit RowWriter(int64_t result_bytes) : streamed_(result_bytes >= kStreamedBytes) {}
  RowWriter(const RowWriter&) = delete;
  RowWriter& operator=(const RowWriter&) = delete;
  ~RowWriter() {
#if defined(__SSE2__)
    if (streamed_) _mm_sfence();
#endif
  }

  void copy(char* to, const char* from, int64_t bytes) const {
#if defined(__SSE2__)
    if (streamed_ && bytes >= 256) return stream(to, from, bytes);
#endif
    std::memcpy(to, from, bytes);
  }

  // Asks for a row that is copied a few calls later: rows picked from a table lie where no prefetcher of the processor
  // expects them. It goes on by itself after some lines; asking for all of a long row is slower.
  static void prefetch(const char* from, int64_t bytes) {
    const int64_t asked = std::min<int64_t>(bytes, 256);
    for (int64_t line = 0; line < asked; line += 64) __builtin_prefetch(from + line);
  }

  // `to` is the start of a row.
  void fill(char* to, const FillPattern& pattern, int64_t bytes) const {
#if defined(__SSE2__)
    if (streamed_ && bytes >= 256) return stream_fill(to, pattern, bytes);
#endif
    if (pattern.is_uniform()) {
      std::memset(to, pattern.bytes[0], bytes);
      return;
    }
    int64_t done = 0;
    for (; done + 16 <= bytes; done += 16) std::memcpy(to + done, pattern.bytes, 16);
    std::memcpy(to + done, pattern.bytes, bytes - done);
  }

 private:
#if defined(__SSE2__)
  static void stream(char* to, const char* from, int64_t bytes) {
    const int64_t head = -reinterpret_cast<intptr_t>(to) & 63;  // to the start of a cache line
    std::memcpy(to, from, head);
    int64_t done = head;
    for (; done + 64 <= bytes; done += 64) {
      const auto* source = reinterpret_cast<const __m128i*>(from + done);
      auto* target = reinterpret_cast<__m128i*>(to + done);
      const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1), c = _mm_loadu_si128(source + 2),
                    d = _mm_loadu_si128(source + 3);
      _mm_stream_si128(target, a);
      _mm_stream_si128(target + 1, b);
      _mm_stream_si128(target + 2, c);
      _mm_stream_si128(target + 3, d);
    }
    std::memcpy(to + done, from + done, bytes - done);
  }

  static void stream_fill(char* to, const FillPattern& pattern, int64_t bytes) {
    const int64_t head = -reinterpret_cast<intptr_t>(to) & 15;
    FillPattern turned;  // as it continues after `head` bytes
    for (int64_t i = 0; i < 16; ++i) turned.bytes[i] = pattern.bytes[(head + i) % 16];
    std::memcpy(to, pattern.bytes, head);
    const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(turned.bytes));
    int64_t done = head;
    for (; done + 16 <= bytes; done += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + done), value);
    std::memcpy(to + done, turned.bytes, bytes - done);
  }
#endif

  bool streamed_;
};

// ---- values of offsets; these checks are what keeps the copies inside the tensors

// First 0, non-decreasing, no sequence longer than max_length, last `total` if exact and at most that if not.
inline void check_offset_values(const char* op, const Indices& cu_seqlens, int64_t batch, int64_t total,
                                int64_t max_length, bool exact) {
  ZTOK_CHECK(cu_seqlens[0] == 0, op, "cu_seqlens[0]: expected 0, got ", cu_seqlens[0]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = cu_seqlens[b], end = cu_seqlens[b + 1];
    ZTOK_CHECK(begin <= end, op, "cu_seqlens: expected non-decreasing offsets, got ", begin, " before ", end,
               " at sequence ", b);
    // Non-negative by induction from cu_seqlens[0] == 0, so the difference cannot overflow.
    ZTOK_CHECK(end - begin <= max_length, op, "cu_seqlens: expected lengths of at most S = ", max_length, ", got ",
               end - begin, " at sequence ", b);
  }
  const int64_t last = cu_seqlens[batch];
  ZTOK_CHECK(exact ? last == total : last <= total, op, "cu_seqlens[-1]: expected ", exact ? "" : "at most ", total,
             " (the packed rows), got ", last);
}

}  // namespace ztok
