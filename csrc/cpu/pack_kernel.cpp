#include "pack_kernel.h"

#include <cfloat>

#include "bounds.h"
#include "exact_score.h"
#include "score_tile.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

// Unit codes in float32; a code of zeros stays zero. The length is taken in float64, where no square of a float32 over-
// or underflows.
template <typename T>
void unit_codes(const T* codes, int64_t stride, int64_t count, int64_t width, float* units) {
  float buffer[kChunk];
  for (int64_t i = 0; i < count; ++i, codes += stride, units += width) {
    for (int64_t first = 0; first < width; first += kChunk) {
      const int64_t depth = smaller(kChunk, width - first);
      const float* c = floats_of(codes + first, depth, buffer);
      for (int64_t k = 0; k < depth; ++k) units[first + k] = c[k];
    }
    const double square = squared_norm(units, width);
    const double inverse = square > 0 ? 1 / __builtin_sqrt(square) : 0;
    for (int64_t k = 0; k < width; ++k) units[k] = static_cast<float>(units[k] * inverse);
  }
}

template <typename T>
void pack_typed(const T* codes, const Matrix& matrix, Metric metric, const float* centre, float* staging,
                CodeBlock& block) {
  alignas(64) float squares[kBlockCodes];
  codes += block.first * matrix.stride;
  if (metric == Metric::cosine) {
    unit_codes(codes, matrix.stride, block.count, matrix.width, staging);
    pack_panels(staging, matrix.width, block.count, matrix.width, nullptr, block.panels, squares);
  } else {
    pack_panels(codes, matrix.stride, block.count, matrix.width, centre, block.panels, squares);
  }
  for (int64_t i = 0; i < block.count; ++i) block.bias[i] = metric == Metric::l2 ? -squares[i] / 2 : 0.0f;
  for (int64_t i = block.count; i < panels_of(block.count) * kPanel; ++i) block.bias[i] = -FLT_MAX;
  block.longest = longest_of(squares, block.count, matrix.width);
}

}  // namespace

void pack_codes(const Matrix& codes, Metric metric, const float* centre, float* staging, CodeBlock& block) {
  switch (codes.element) {
    case Element::float16:
      return pack_typed(static_cast<const Half*>(codes.data), codes, metric, centre, staging, block);
    case Element::bfloat16:
      return pack_typed(static_cast<const BFloat16*>(codes.data), codes, metric, centre, staging, block);
    default:
      return pack_typed(static_cast<const float*>(codes.data), codes, metric, centre, staging, block);
  }
}

void to_floats(const Matrix& matrix, int64_t first, int64_t count, float* rows) {
  for (int64_t i = first; i < first + count; ++i, rows += matrix.width) {
    const int64_t offset = i * matrix.stride;
    switch (matrix.element) {
      case Element::float16:
        floats_of(static_cast<const Half*>(matrix.data) + offset, matrix.width, rows);
        break;
      case Element::bfloat16:
        floats_of(static_cast<const BFloat16*>(matrix.data) + offset, matrix.width, rows);
        break;
      default:
        __builtin_memcpy(rows, static_cast<const float*>(matrix.data) + offset, matrix.width * sizeof(float));
    }
  }
}

void pack_tiles(const float* rows, const int32_t* index, int64_t count, int64_t width, const float* centre,
                float* tiles) {
  pack_rows(rows, index, count, width, centre, tiles);
}

void centre_rows(const float* rows, int64_t count, int64_t width, const float* centre, float* centred) {
  for (int64_t i = 0; i < count; ++i, rows += width, centred += width) {
    for (int64_t k = 0; k < width; ++k) centred[k] = rows[k] - centre[k];
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
