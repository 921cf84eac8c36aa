// Packing for lora_kernel.cpp, once per instruction set (see isa.h): panels of kColumns columns, each
// [depth, kColumns] in float32, in the order in which the register tile reads them.
#pragma once

#include "lora_kernel.h"
#include "simd.h"

#define ZTOK_INLINE inline __attribute__((always_inline))

namespace ztok {
namespace ZTOK_ISA {
namespace {

constexpr int kColumns = 2 * kWidth;  // a register tile is kLoraRows x 2 vectors

// Calls f with a typed pointer to the data.
template <typename F>
ZTOK_INLINE void with_type(const void* data, Element element, F&& f) {
  switch (element) {
    case Element::float32:
      return f(static_cast<const float*>(data));
    case Element::float16:
      return f(static_cast<const Half*>(data));
    case Element::bfloat16:
      return f(static_cast<const BFloat16*>(data));
  }
}

// The first n lanes; n may be anything.
template <typename T>
ZTOK_INLINE Vec load_some(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load_first(p, static_cast<int>(n)) : zeros();
}

template <typename T>
ZTOK_INLINE void store_some(T* p, Vec v, int64_t n) {
  if (n >= kWidth) {
    store(p, v);
  } else if (n > 0) {
    store_first(p, v, static_cast<int>(n));
  }
}

// From rows of one column each: dst[k, j] = src[j * stride + k].
template <typename T>
void pack_by_columns(const T* src, int64_t stride, int64_t depth, int64_t columns, float* dst) {
  for (int64_t j = 0; j < kColumns; j += kWidth) {
    for (int64_t k = 0; k < depth; k += kWidth) {
      const int64_t n = depth - k;
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        square[i] = j + i < columns ? load_some(src + (j + i) * stride + k, n) : zeros();
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        if (i < n) store(dst + (k + i) * kColumns + j, square[i]);
      }
    }
  }
}

// From rows of one k each: dst[k, j] = src[row(k) * stride + j].
template <typename T>
void pack_by_depth(const T* src, int64_t stride, const int32_t* rows, int64_t depth, int64_t columns, float* dst) {
  const int low = static_cast<int>(smaller(kWidth, columns)), high = static_cast<int>(columns) - low;
  for (int64_t k = 0; k < depth; ++k, dst += kColumns) {
    const T* row = src + (rows ? rows[k] : k) * stride;
    store(dst, low == kWidth ? load(row) : load_first(row, low));
    store(dst + kWidth, high == kWidth ? load(row + kWidth) : load_first(row + kWidth, high));
  }
}

// k in [k0, k0 + depth), columns [begin, end); `offset` elements in (the adapter's).
void pack(const LoraOperand& b, bool by_columns, const int32_t* rows, int64_t offset, int64_t k0, int64_t depth,
          int64_t begin, int64_t end, float* dst) {
  with_type(b.data, b.element, [&](const auto* data) {
    data += offset;
    for (int64_t j = begin; j < end; j += kColumns, dst += depth * kColumns) {
      const int64_t columns = smaller(kColumns, end - j);
      if (by_columns) {
        pack_by_columns(data + j * b.stride + k0, b.stride, depth, columns, dst);
      } else {
        pack_by_depth(data + (rows ? 0 : k0 * b.stride) + j, b.stride, rows ? rows + k0 : rows, depth, columns, dst);
      }
    }
  });
}

}  // namespace
}  // namespace ZTOK_ISA
}  // namespace ztok
