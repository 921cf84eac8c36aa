// int8 products with AVX-VNNI, the VNNI of processors without AVX-512: 4 products for each of 8 sums at once.
#include "int8_products.h"

#ifdef __AVXVNNI__
#include <cstring>

#include <immintrin.h>

namespace ztok {
namespace {

constexpr int kPart = 16, kMostSums = 6, kMostRows = 6;
struct Columns {
  __m256i v[2];
};
using Quad = __m256i;
using Sums = Columns;

inline __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Columns load_columns(const uint8_t* from) { return {{load(from), load(from + 32)}}; }
inline Quad load_quad(const int8_t* from) {
  int32_t quad;
  std::memcpy(&quad, from, 4);
  return _mm256_set1_epi32(quad);
}
inline Sums zero_sums() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline void add(Sums& sums, Columns columns, Quad quad) {
  // not the intrinsic, with which GCC 12 copies and spills the sums
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums.v[0]) : "x"(columns.v[0]), "x"(quad));
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums.v[1]) : "x"(columns.v[1]), "x"(quad));
}
inline Sums plus(Sums a, Sums b) { return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}}; }
inline void store(int32_t* to, Sums sums, int32_t less) {
  for (int half = 0; half < 2; ++half) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * half),
                        _mm256_sub_epi32(sums.v[half], _mm256_set1_epi32(less)));
  }
}

}  // namespace
}  // namespace ztok

#include "int8_tile.h"

namespace ztok {
Int8Products int8_products_avx_vnni() { return int8_tiles; }
}  // namespace ztok
#else
namespace ztok {
Int8Products int8_products_avx_vnni() { return nullptr; }
}  // namespace ztok
#endif
