#include "ordered_products_kernel.h"

#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

constexpr int kColumns = 16;  // of a panel

#if defined(__AVX2__) || defined(__aarch64__)
constexpr int kParts = kColumns / kWidth;         // vectors of a panel
constexpr int kMostSums = kWidth == 8 ? 12 : 24;  // vectors of sums in registers
constexpr int kMostRows = kWidth == 16 ? 12 : 24 / kParts / (kWidth == 8 ? 2 : 1);

// Panels at once: enough sums to hide the latency of fma, since each is one chain.
constexpr int panels_of(int rows) {
  int panels = 1;
  while (panels < 8 && 2 * panels * rows * kParts <= kMostSums) panels *= 2;
  return panels;
}

template <int kRows, int kPanels>
void tile(const float* rows, int64_t row_stride, const float* panels, int64_t depth, float* out, int64_t out_stride) {
  Vec sums[kRows][kPanels * kParts];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kPanels * kParts; ++v) sums[r][v] = zeros();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kPanels * kParts];
#pragma GCC unroll 16
    for (int v = 0; v < kPanels * kParts; ++v) {
      columns[v] = load(panels + (v / kParts * depth + k) * kColumns + v % kParts * kWidth);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vec x = broadcast(rows[r * row_stride + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kPanels * kParts; ++v) sums[r][v] = fma(x, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kPanels * kParts; ++v) store(out + r * out_stride + v * kWidth, sums[r][v]);
  }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t);

template <int kRows>
Tile tile_of(int rows, bool several) {
  if constexpr (kRows == 0) {
    return nullptr;
  } else {
    if (rows != kRows) return tile_of<kRows - 1>(rows, several);
    return several ? tile<kRows, panels_of(kRows)> : tile<kRows, 1>;
  }
}

void products(const float* rows, int64_t row_stride, int64_t count, const float* panels, int64_t depth,
              int64_t num_panels, float* out, int64_t out_stride) {
  const int rest = static_cast<int>(count % kMostRows);
  const int most = panels_of(count >= kMostRows ? kMostRows : rest);
  const auto run = [&](int height, int64_t row, int64_t first, int64_t width) {
    const int at_once = panels_of(height);
    for (int64_t panel = first; panel < first + width;) {
      const bool several = first + width - panel >= at_once;
      tile_of<kMostRows>(height, several)(rows + row * row_stride, row_stride, panels + panel * depth * kColumns, depth,
                                          out + row * out_stride + panel * kColumns, out_stride);
      panel += several ? at_once : 1;
    }
  };
  for (int64_t panel = 0; panel < num_panels; panel += most) {
    const int64_t width = num_panels - panel < most ? num_panels - panel : most;
    for (int64_t row = 0; row + kMostRows <= count; row += kMostRows) run(kMostRows, row, panel, width);
    if (rest > 0) run(rest, count - rest, panel, width);
  }
}
#else
// Without a fused instruction the C library computes it, exactly and slowly.
void products(const float* rows, int64_t row_stride, int64_t count, const float* panels, int64_t depth,
              int64_t num_panels, float* out, int64_t out_stride) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      float* sums = out + row * out_stride + panel * kColumns;
      for (int c = 0; c < kColumns; ++c) sums[c] = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const float* columns = panels + (panel * depth + k) * kColumns;
        for (int c = 0; c < kColumns; ++c) sums[c] = __builtin_fmaf(rows[row * row_stride + k], columns[c], sums[c]);
      }
    }
  }
}
#endif

}  // namespace

void ordered_products(const float* rows, int64_t row_stride, int64_t count, const float* panels, int64_t depth,
                      int64_t num_panels, float* out, int64_t out_stride) {
  products(rows, row_stride, count, panels, depth, num_panels, out, out_stride);
}

}  // namespace ZTOK_ISA
}  // namespace ztok
