// What lora.cpp asks of lora_kernel.cpp: products of small-depth blocks, all through two kernels.
#pragma once

#include <cstdint>

#include "isa.h"
#include "score_layout.h"

namespace ztok {

// Row i starts at element i * stride.
struct LoraOperand {
  const void* data;
  Element element;
  int64_t stride;
};

constexpr int kLoraRows = 6;          // rows of a register tile
constexpr int64_t kLoraDepth = 1024;  // of a packed block: kLoraRows rows of it fill three quarters of a 32 KiB L1
constexpr int64_t kLoraColumns = 64;  // with kLoraDepth half of a 512 KiB L2
constexpr int64_t kLoraUnit = 32;     // tasks begin at multiples of it: a whole number of panels on every processor

// Up to kLoraRows rows that go through the kernel together, all under one adapter (-1: none).
struct LoraStrip {
  int32_t begin, count;  // positions in LoraProduct::rows
  int32_t adapter;
};

// y[i, j] = s (sum over k of a[i, k] b[k, j]) + bias[j] + sum over k of low[i, k] expand[k, j], in float32, rounded
// once.
//
// b and expand are read by rows: of one column each (`by_columns`: b[k, j] is at row j, element k) or of one k each.
// The sum over k is taken in one order, whatever the split into tasks.
struct LoraProduct {
  const float* a;
  int64_t a_stride;
  int64_t depth;
  const int32_t* a_rows;  // position -> row of a
  const int32_t* rows;    // position -> row of low and y

  LoraOperand b;
  bool b_by_columns;
  const int32_t* b_rows;     // k -> row of b; null: k (not with by_columns)
  int64_t b_adapter_stride;  // elements between the adapters' b; 0: one b for all
  const float* scaling;      // s of each adapter; null: 1

  LoraOperand expand;
  bool expand_by_columns;
  int64_t expand_adapter_stride;
  const float* low;  // [rows, rank]; null: no such term
  int64_t rank;

  const void* bias;  // element of y; null: none
  void* y;
  Element y_element;
  int64_t y_stride;
  bool add;  // to what y holds, for a base product that was made elsewhere
};

// Columns [begin, end) of y for some strips. Strips of adapter -1 are left out where b differs by adapter.
ZTOK_KERNEL(void, lora_block, const LoraProduct& product, const LoraStrip* strips, int64_t num_strips, int64_t begin,
            int64_t end, float* scratch)  // scratch: kLoraUnit-rounded columns x (block depth + rank + positions)

// Columns [begin, end) of the same y for few rows, without packing b: each row of b is read once for four rows of a.
// Needs b_by_columns, expand_by_columns, one b for all. adapters [num_rows]; low has rows of `low_stride` floats, those
// past the rank 0 up to a multiple of 16.
ZTOK_KERNEL(void, lora_few_rows, const LoraProduct& product, const int32_t* adapters, int64_t num_rows,
            int64_t low_stride, int64_t begin, int64_t end)

// n elements to float32, and back.
ZTOK_KERNEL(void, lora_widen, const void* from, Element element, float* to, int64_t n)
ZTOK_KERNEL(void, lora_narrow, const float* from, void* to, Element element, int64_t n)

}  // namespace ztok
