#include "lora_kernel.h"

#include <type_traits>

#include "lora_pack.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

constexpr int kRows = kLoraRows;

// ---- one register tile -------------------------------------------------------------------------------------------

constexpr int64_t kChain = 256;  // products that are added up one after another, for the rounding error of long sums

// total += a panel, over `depth`.
template <int R>
ZTOK_INLINE void accumulate(Vec (&total)[R][2], const float* const (&a)[R], const float* panel, int64_t depth) {
  for (int64_t k0 = 0; k0 < depth; k0 += kChain) {
    const int64_t length = smaller(kChain, depth - k0);
    const float* row[R];
    Vec sum[R][2];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      row[i] = a[i] + k0;
      sum[i][0] = sum[i][1] = zeros();
    }
    for (int64_t k = 0; k < length; ++k, panel += kColumns) {
      const Vec b0 = load(panel), b1 = load(panel + kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Vec x = broadcast(row[i][k]);
        sum[i][0] = fma(x, b0, sum[i][0]);
        sum[i][1] = fma(x, b1, sum[i][1]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      total[i][0] += sum[i][0];
      total[i][1] += sum[i][1];
    }
  }
}

struct TileStep {
  int64_t k0, depth;
  bool first, last;
  const float* panel;
  const float* expand_panel;  // null: no low-rank term
  float* partial;             // [strip's rows, stride] between depth blocks
  int64_t partial_stride;
  int64_t column, columns;  // first column of the tile in y, how many are there
  float scale;
};

template <int R>
void tile(const LoraProduct& p, const int32_t* a_rows, const int32_t* rows, const TileStep& step) {
  Vec sum[R][2];
  const float* a[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) a[i] = p.a + a_rows[i] * p.a_stride + step.k0;
  if (step.first) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = zeros();
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      sum[i][0] = load(step.partial + i * step.partial_stride);
      sum[i][1] = load(step.partial + i * step.partial_stride + kWidth);
    }
  }
  accumulate<R>(sum, a, step.panel, step.depth);
  if (!step.last) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      store(step.partial + i * step.partial_stride, sum[i][0]);
      store(step.partial + i * step.partial_stride + kWidth, sum[i][1]);
    }
    return;
  }
  if (step.expand_panel != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = p.low + rows[i] * p.rank;
    accumulate<R>(sum, a, step.expand_panel, p.rank);
  }
  with_type(p.y, p.y_element, [&](const auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    T* y = static_cast<T*>(p.y) + step.column;
    const T* bias = static_cast<const T*>(p.bias) + step.column;
    const int64_t n = step.columns;
    const Vec scale = broadcast(step.scale);
    const Vec b0 = p.bias ? load_some(bias, n) : zeros(), b1 = p.bias ? load_some(bias + kWidth, n - kWidth) : zeros();
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      T* row = y + rows[i] * p.y_stride;
      Vec y0 = sum[i][0] * scale + b0, y1 = sum[i][1] * scale + b1;
      if (p.add) {
        y0 += load_some(row, n);
        y1 += load_some(row + kWidth, n - kWidth);
      }
      store_some(row, y0, n);
      store_some(row + kWidth, y1, n - kWidth);
    }
  });
}

using TileFunction = void (*)(const LoraProduct&, const int32_t*, const int32_t*, const TileStep&);
constexpr TileFunction kTiles[kRows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

// ---- few rows ----------------------------------------------------------------------------------------------------

// sum[i][j] += a[i, k .. k + kWidth) b[j, ..) for the whole depth.
template <int R, int J, typename T>
ZTOK_INLINE void dots(Vec (&sum)[R][J], const float* const (&a)[R], const T* b, int64_t stride, int64_t depth) {
  int64_t k = 0;
  for (; k + kWidth <= depth; k += kWidth) {
    Vec columns[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) columns[j] = load(b + j * stride + k);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec x = load(a[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[i][j] = fma(x, columns[j], sum[i][j]);
    }
  }
  if (const int n = static_cast<int>(depth - k); n > 0) {
    for (int i = 0; i < R; ++i) {
      for (int j = 0; j < J; ++j) {
        sum[i][j] = fma(load_first(a[i] + k, n), load_first(b + j * stride + k, n), sum[i][j]);
      }
    }
  }
}

template <int R, int J>
void few(const LoraProduct& p, const int32_t* adapters, int64_t row, int64_t low_stride, int64_t column) {
  Vec sum[R][J];
  const float* a[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    a[i] = p.a + (row + i) * p.a_stride;
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum[i][j] = zeros();
  }
  with_type(p.b.data, p.b.element,
            [&](const auto* data) { dots<R, J>(sum, a, data + column * p.b.stride, p.b.stride, p.depth); });
  if (p.low != nullptr) {
    with_type(p.expand.data, p.expand.element, [&](const auto* expand) {
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        if (adapters[row + i] < 0) continue;
        const float* low = p.low + (row + i) * low_stride;
        const auto* b = expand + adapters[row + i] * p.expand_adapter_stride + column * p.expand.stride;
        for (int64_t k = 0; k < p.rank; k += kWidth) {
          const int64_t n = p.rank - k;
          const Vec t = load(low + k);
#pragma GCC unroll 8
          for (int j = 0; j < J; ++j) sum[i][j] = fma(t, load_some(b + j * p.expand.stride + k, n), sum[i][j]);
        }
      }
    });
  }
  with_type(p.y, p.y_element, [&](const auto* typed) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
    T* y = static_cast<T*>(p.y) + column;
    const T* bias = static_cast<const T*>(p.bias) + column;
    for (int i = 0; i < R; ++i) {
      const float scale = p.scaling ? p.scaling[adapters[row + i]] : 1.0f;
      for (int j = 0; j < J; ++j) {
        const float b = p.bias ? to_float(bias[j]) : 0.0f;
        y[(row + i) * p.y_stride + j] = from_float<T>(reduce_add(sum[i][j]) * scale + b);
      }
    }
  });
}

using FewFunction = void (*)(const LoraProduct&, const int32_t*, int64_t, int64_t, int64_t);
// By rows - 1: four columns for up to three rows, three for more (at most 12 sums), and the last columns one by one.
constexpr FewFunction kFewByFour[3] = {few<1, 4>, few<2, 4>, few<3, 4>};
constexpr FewFunction kFewByThree[4] = {few<1, 3>, few<2, 3>, few<3, 3>, few<4, 3>};
constexpr FewFunction kFewByOne[4] = {few<1, 1>, few<2, 1>, few<3, 1>, few<4, 1>};

}  // namespace

void lora_block(const LoraProduct& p, const LoraStrip* strips, int64_t num_strips, int64_t begin, int64_t end,
                float* scratch) {
  const int64_t blocks = p.depth > 0 ? (p.depth + kLoraDepth - 1) / kLoraDepth : 1;
  const int64_t block_depth = (p.depth + blocks - 1) / blocks;
  const int64_t panels = (end - begin + kColumns - 1) / kColumns;
  float* const panel = scratch;
  float* const expand_panel = panel + panels * kColumns * block_depth;
  float* const partial = expand_panel + panels * kColumns * (p.low ? p.rank : 0);
  const bool per_adapter = p.b_adapter_stride != 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t k0 = block * block_depth, depth = smaller(block_depth, p.depth - k0);
    const bool last = block + 1 == blocks;
    int32_t packed_b = -1, packed_expand = -1;
    if (!per_adapter) pack(p.b, p.b_by_columns, p.b_rows, 0, k0, depth, begin, end, panel);
    float* sums = partial;
    for (int64_t s = 0; s < num_strips; ++s) {
      const LoraStrip& strip = strips[s];
      if (per_adapter) {
        if (strip.adapter < 0) continue;
        if (strip.adapter != packed_b) {
          packed_b = strip.adapter;
          pack(p.b, p.b_by_columns, p.b_rows, packed_b * p.b_adapter_stride, k0, depth, begin, end, panel);
        }
      }
      const bool low_rank = last && p.low != nullptr && strip.adapter >= 0;
      if (low_rank && strip.adapter != packed_expand) {
        packed_expand = strip.adapter;
        pack(p.expand, p.expand_by_columns, nullptr, packed_expand * p.expand_adapter_stride, 0, p.rank, begin, end,
             expand_panel);
      }
      TileStep step{k0, depth, block == 0, last, nullptr, nullptr, nullptr, panels * kColumns, 0, 0, 1.0f};
      if (p.scaling != nullptr) step.scale = p.scaling[strip.adapter];
      for (int64_t j = 0; j < panels; ++j) {
        step.panel = panel + j * depth * kColumns;
        step.expand_panel = low_rank ? expand_panel + j * p.rank * kColumns : nullptr;
        step.partial = sums + j * kColumns;
        step.column = begin + j * kColumns;
        step.columns = end - step.column;
        kTiles[strip.count - 1](p, p.a_rows + strip.begin, p.rows + strip.begin, step);
      }
      sums += strip.count * panels * kColumns;
    }
  }
}

void lora_few_rows(const LoraProduct& p, const int32_t* adapters, int64_t num_rows, int64_t low_stride, int64_t begin,
                   int64_t end) {
  // Columns outside, so that a row of b comes from memory once and for the other rows of a from the cache.
  const int64_t width = num_rows <= 3 ? 4 : 3;
  for (int64_t j = begin; j < end;) {
    const int64_t columns = end - j >= width ? width : 1;
    const FewFunction* kernels = columns == 4 ? kFewByFour : columns == 3 ? kFewByThree : kFewByOne;
    for (int64_t i = 0; i < num_rows; i += 4) {
      kernels[smaller(4, num_rows - i) - 1](p, adapters, i, low_stride, j);
    }
    j += columns;
  }
}

void lora_narrow(const float* from, void* to, Element element, int64_t n) {
  with_type(to, element, [&](const auto* typed) {
    auto* target = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>*>(typed);
    for (int64_t i = 0; i < n; i += kWidth) {
      store_some(target + i, load_some(from + i, n - i), n - i);
    }
  });
}

void lora_widen(const void* from, Element element, float* to, int64_t n) {
  with_type(from, element, [&](const auto* source) {
    for (int64_t i = 0; i < n; i += kWidth) store_some(to + i, load_some(source + i, n - i), n - i);
  });
}

}  // namespace ZTOK_ISA
}  // namespace ztok
