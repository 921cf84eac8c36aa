#include "slot_rows_kernel.h"

#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {

void add_slot(const float* word, const float* gate, const float* place, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) {
    store(out + i, load(out + i) + (load(word + i) * load(gate + i) + load(place + i)));
  }
  for (; i < width; ++i) out[i] = out[i] + (word[i] * gate[i] + place[i]);
}

}  // namespace ZTOK_ISA
}  // namespace ztok
