// Gradients through chosen codes, one version per instruction set; see code_gradients.cpp.
#pragma once

#include "isa.h"
#include "score_layout.h"

namespace ztok {

constexpr int kCosineTerms = 3;

// r_0 is a row and r_{l+1} = r_l - c_l, c_l its code at level l. The loss is the sum over rows and levels of
// weight * distance(r_l, c_l), for l2 half of the squared length of r_l - c_l.
struct ChosenCodes {
  Matrix rows;
  const float* books;    // [levels, size, width]
  const int32_t* codes;  // [rows, levels]; -1: the level is left out, r_{l+1} = r_l
  int64_t levels, size;
  Metric metric;
  const float* weights;       // [rows, levels], or null: 1
  const float* cosine_terms;  // [rows, levels, kCosineTerms], for cosine only
};

// Floats of memory that the two functions below want besides, for each thread.
static inline int64_t walk_floats(int64_t levels) { return 64 * levels; }

// For rows [begin, end): the cosine of r_l and c_l, 1 / |r_l| and 1 / |c_l|; the last is 0 where one of them has no
// direction, so that there is no gradient. `residual` [width] is memory to work in.
ZTOK_KERNEL(void, find_cosine_terms, const ChosenCodes& chosen, int64_t begin, int64_t end, float* residual,
            float* terms)

// Rows [begin, end) of `gradients` [rows, width]: scale * the loss's gradient by the row, plus the row of `straight`
// where that is not null and the row has a code. Both are of the element format of the rows.
ZTOK_KERNEL(void, gradients_of_rows, const ChosenCodes& chosen, int64_t begin, int64_t end, const void* straight,
            float scale, void* gradients, float* memory)

// Adds, row by row in their order, scale * the loss's gradient by the codes [first_code, last_code) of all levels to
// columns [begin, end) of `gradients` [levels, size, width].
ZTOK_KERNEL(void, add_gradients_of_codes, const ChosenCodes& chosen, int64_t begin, int64_t end, int64_t first_code,
            int64_t last_code, float scale, float* gradients, float* memory)

}  // namespace ztok
