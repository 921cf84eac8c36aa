// What the engine does between its linear layers, once per instruction set (see isa.h), with the arithmetic of
// docs/determinism.md. Widths are multiples of 16.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ztok {

// Products of a block of columns on their way to the layer's result: int32 sums to be scaled, or float32 sums as they
// are (weight_scales is then null).
struct Products {
  const void* sums;  // [rows, stride]
  int64_t stride, rows, columns;
  const float* weight_scales;  // of the block's first column on; null: float32 sums
  const float* row_scales;
  const float* bias;  // of the block's first column on, or null
};

ZTOK_KERNEL(void, engine_norm, const float* x, const float* weight, int64_t width, float eps, float* out)

// out[r, c] = product
ZTOK_KERNEL(void, engine_store, const Products& products, float* out, int64_t out_stride)

// out[r, c] += product
ZTOK_KERNEL(void, engine_add, const Products& products, float* out, int64_t out_stride)

// Columns are panels of 16 in turn of gate and up: out[r, c] = silu(gate) * up, half as many columns.
ZTOK_KERNEL(void, engine_gate, const Products& products, float* out, int64_t out_stride)

// The greatest product of each row and its column, if above what is there; `first` is the number of column 0.
// A column that is not finite makes best NaN.
ZTOK_KERNEL(void, engine_best, const Products& products, int64_t first, float* best, int64_t* index)

// cosines and sines [half] of a position
ZTOK_KERNEL(void, engine_angles, float position, const float* frequencies, int64_t half, float* cosines, float* sines)

ZTOK_KERNEL(void, engine_rotate, float* head, int64_t half, const float* cosines, const float* sines)

// W_i of the sampling rule: rint(exp(logit / temperature - greatest) * 2^30); false if a logit is not finite.
ZTOK_KERNEL(bool, engine_weights, const float* logits, int64_t count, float temperature, int64_t* weights)

}  // namespace ztok
