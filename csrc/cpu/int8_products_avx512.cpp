// int8 products with AVX-512 but no VNNI. Weights and rows are widened to 16 bits: the instruction for bytes, which
// adds two products of 8 bits in 16, would saturate.
#include "int8_products.h"

#ifdef __AVX512BW__
#include <cstring>

#include <immintrin.h>

namespace ztok {
namespace {

constexpr int kPart = 16, kMostSums = 8, kMostRows = 8;
struct Columns {
  __m512i v[2];  // 16 bits: 4 products deep of columns 0 to 7, and of 8 to 15
};
using Quad = __m512i;
using Sums = Columns;  // two for each column, side by side

inline __m512i widen(const uint8_t* from) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Columns load_columns(const uint8_t* from) { return {{widen(from), widen(from + 32)}}; }
inline Quad load_quad(const int8_t* from) {
  int32_t quad;
  std::memcpy(&quad, from, 4);
  return _mm512_cvtepi8_epi16(_mm256_set1_epi32(quad));
}
inline Sums zero_sums() { return {{_mm512_setzero_si512(), _mm512_setzero_si512()}}; }
inline void add(Sums& sums, Columns columns, Quad quad) {
  sums.v[0] = _mm512_add_epi32(sums.v[0], _mm512_madd_epi16(columns.v[0], quad));
  sums.v[1] = _mm512_add_epi32(sums.v[1], _mm512_madd_epi16(columns.v[1], quad));
}
inline Sums plus(Sums a, Sums b) { return {{_mm512_add_epi32(a.v[0], b.v[0]), _mm512_add_epi32(a.v[1], b.v[1])}}; }
inline void store(int32_t* to, Sums sums, int32_t less) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i total = _mm512_add_epi32(_mm512_permutex2var_epi32(sums.v[0], even, sums.v[1]),
                                         _mm512_permutex2var_epi32(sums.v[0], odd, sums.v[1]));
  _mm512_storeu_si512(to, _mm512_sub_epi32(total, _mm512_set1_epi32(less)));
}

}  // namespace
}  // namespace ztok

#include "int8_tile.h"

namespace ztok {
Int8Products int8_products_avx512() { return int8_tiles; }
}  // namespace ztok
#else
namespace ztok {
Int8Products int8_products_avx512() { return nullptr; }
}  // namespace ztok
#endif
