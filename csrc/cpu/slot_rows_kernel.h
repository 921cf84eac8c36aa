// Input rows of Z-tokens of slots, once per instruction set (see isa.h).
#pragma once

#include <cstdint>

#include "isa.h"

namespace ztok {

// out[i] = out[i] + (word[i] * gate[i] + place[i]), each operation rounded, for i < width.
ZTOK_KERNEL(void, add_slot, const float* word, const float* gate, const float* place, int64_t width, float* out)

}  // namespace ztok
