// How rows and codes are handed to the kernels that multiply them (score_tile.h), and how the work is cut.
#pragma once

#include <cstdint>

namespace ztok {

enum class Element : int32_t { float32, float16, bfloat16 };
enum class Metric : int32_t { l2, cosine, dot };

// Rows as they lie in memory; the elements of a row are adjacent, `stride` elements lie from row to row.
struct Matrix {
  const void* data;
  Element element;
  int64_t rows, width, stride;
};

constexpr int kTileRows = 6;      // rows of a register tile
constexpr int kBlockCodes = 128;  // codes packed, searched and bounded at a time: whole panels on every machine
constexpr int kMaxDepth = 256;    // elements of a code in one go

// Up to kBlockCodes packed codes and what bounds their scores.
struct CodeBlock {
  float* panels;  // blocks_floats(width) floats
  float* bias;    // [kBlockCodes]: where scores start, -|c|^2 / 2 for l2, else 0; for what is no code the least float
  float longest;  // no code of the block is longer; infinity if the square of a length is no float32
  int64_t first, count;
};

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t round_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

// The width is cut into equal parts of at most kMaxDepth, multiples of 16 but for the last.
static inline int64_t part_depth(int64_t width) {
  const int64_t parts = (width + kMaxDepth - 1) / kMaxDepth;
  return parts <= 1 ? width : round_up((width + parts - 1) / parts, 16);
}

}  // namespace ztok
