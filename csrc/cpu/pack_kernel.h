// Rows and codes as the kernels want them, one version per instruction set.
#pragma once

#include "isa.h"
#include "score_layout.h"

namespace ztok {

// Packs codes [block.first, block.first + block.count), less `centre` [width] unless it is null. `staging` holds
// kBlockCodes rows of floats, for cosine alone.
ZTOK_KERNEL(void, pack_codes, const Matrix& codes, Metric metric, const float* centre, float* staging, CodeBlock& block)

// float32 rows [count, width] from whatever they are.
ZTOK_KERNEL(void, to_floats, const Matrix& matrix, int64_t first, int64_t count, float* rows)

// Rows rows[index[i]], less `centre` unless it is null, in tiles; see score_tile.h.
ZTOK_KERNEL(void, pack_tiles, const float* rows, const int32_t* index, int64_t count, int64_t width,
            const float* centre, float* tiles)

// The same, one after another and not in tiles.
ZTOK_KERNEL(void, centre_rows, const float* rows, int64_t count, int64_t width, const float* centre, float* centred)

}  // namespace ztok
