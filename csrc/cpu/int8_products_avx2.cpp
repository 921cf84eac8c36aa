// int8 products with AVX2. Weights and rows are widened to 16 bits: the instruction for bytes, which adds two products
// of 8 bits in 16, would saturate. A part is half a panel, so that 4 rows share the widened weights.
#include "int8_products.h"

#ifdef __AVX2__
#include <cstring>

#include <immintrin.h>

namespace ztok {
namespace {

constexpr int kPart = 8, kMostSums = 4, kMostRows = 4;
struct Columns {
  __m256i v[2];  // 16 bits: 4 products deep of columns 0 to 3, and of 4 to 7
};
using Quad = __m256i;
using Sums = Columns;  // two for each column, side by side

inline __m256i widen(const uint8_t* from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Columns load_columns(const uint8_t* from) { return {{widen(from), widen(from + 16)}}; }
inline Quad load_quad(const int8_t* from) {
  int32_t quad;
  std::memcpy(&quad, from, 4);
  return _mm256_cvtepi8_epi16(_mm_set1_epi32(quad));
}
inline Sums zero_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline void add(Sums& sums, Columns columns, Quad quad) {
  sums.v[0] = _mm256_add_epi32(sums.v[0], _mm256_madd_epi16(columns.v[0], quad));
  sums.v[1] = _mm256_add_epi32(sums.v[1], _mm256_madd_epi16(columns.v[1], quad));
}
inline Sums plus(Sums a, Sums b) { return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}}; }
inline void store(int32_t* to, Sums sums, int32_t less) {
  const __m256i pairs = _mm256_hadd_epi32(sums.v[0], sums.v[1]);  // columns 0 1 4 5 2 3 6 7
  const __m256i total = _mm256_permute4x64_epi64(pairs, 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_sub_epi32(total, _mm256_set1_epi32(less)));
}

}  // namespace
}  // namespace ztok

#include "int8_tile.h"

namespace ztok {
Int8Products int8_products_avx2() { return int8_tiles; }
}  // namespace ztok
#else
namespace ztok {
Int8Products int8_products_avx2() { return nullptr; }
}  // namespace ztok
#endif
