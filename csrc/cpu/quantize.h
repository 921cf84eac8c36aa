// Residual quantisation, for the ops that need it.
#pragma once

#include "nearest.h"

namespace ztok {

struct Quantized {
  int32_t* codes;   // [rows, levels], -1 where a level is not used
  void* quantized;  // [rows, width]: sums of the chosen codes
  Element element;  // of `quantized`
  int64_t* usage;   // [levels, size]: how many rows chose each code
};

// The contract of ztok_fast.ops.residual_quantize. Returns the loss, the mean over the used levels of all rows of
// |z - q|^2 / width, 0 when none is used. The result does not depend on the number of threads. Throws if a level is
// out of range or a code is not finite.
float quantize_rows(const char* op, const Matrix& latents, const Codebooks& codebooks, const LevelCounts& levels,
                    const Quantized& result);

}  // namespace ztok
