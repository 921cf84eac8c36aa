// int8 products with AVX512-VNNI: one instruction adds 4 products to each of 16 sums.
#include "int8_products.h"

#ifdef __AVX512VNNI__
#include <cstring>

#include <immintrin.h>

namespace ztok {
namespace {

constexpr int kPart = 16, kMostSums = 24, kMostRows = 12;
using Columns = __m512i;
using Quad = __m512i;
using Sums = __m512i;

inline Columns load_columns(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline Quad load_quad(const int8_t* from) {
  int32_t quad;
  std::memcpy(&quad, from, 4);
  return _mm512_set1_epi32(quad);
}
inline Sums zero_sums() { return _mm512_setzero_si512(); }
inline void add(Sums& sums, Columns columns, Quad quad) {
  // not the intrinsic, with which GCC 12 copies and spills the sums
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(columns), "v"(quad));
}
inline Sums plus(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline void store(int32_t* to, Sums sums, int32_t less) {
  _mm512_storeu_si512(to, _mm512_sub_epi32(sums, _mm512_set1_epi32(less)));
}

}  // namespace
}  // namespace ztok

#include "int8_tile.h"

namespace ztok {
Int8Products int8_products_avx512_vnni() { return int8_tiles; }
}  // namespace ztok
#else
namespace ztok {
Int8Products int8_products_avx512_vnni() { return nullptr; }
}  // namespace ztok
#endif
