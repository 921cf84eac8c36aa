// Sixteen lanes of floats on every instruction set, with the arithmetic of docs/determinism.md: the same bits
// everywhere. Included by kernel files only (see isa.h).
//
//   load16, store16 (of float, or Half, rounded to nearest even), splat, + - * /, fma (rounded once), square_root
//   larger(a, b): a > b ? a : b       smaller_of(a, b): a < b ? a : b       negated: of the sign alone
//   first_lanes(a, n): the n first lanes of a, 0 in the others
//   tree_sum, tree_max: over the lanes
//   exp16, silu16: as specified
#pragma once

#include <cstdint>

#include "simd.h"

#define ZTOK_LANES inline __attribute__((always_inline))

namespace ztok {
namespace ZTOK_ISA {

constexpr int kLaneCount = 16;

#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
};
ZTOK_LANES Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
ZTOK_LANES Lanes load16(const float* p) { return {_mm512_loadu_ps(p)}; }
ZTOK_LANES Lanes load16(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
ZTOK_LANES void store16(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
ZTOK_LANES void store16(Half* p, Lanes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
ZTOK_LANES Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
ZTOK_LANES Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
ZTOK_LANES Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
ZTOK_LANES Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
ZTOK_LANES Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ZTOK_LANES Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
ZTOK_LANES Lanes smaller_of(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
ZTOK_LANES Lanes negated(Lanes a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
ZTOK_LANES Lanes first_lanes(Lanes a, int64_t n) {
  const auto mask = static_cast<__mmask16>(n >= kLaneCount ? 0xffff : n <= 0 ? 0 : (1u << n) - 1u);
  return {_mm512_maskz_mov_ps(mask, a.v)};
}
// 0 where x < limit, else a
ZTOK_LANES Lanes zero_below(Lanes x, float limit, Lanes a) {
  return {_mm512_mask_mov_ps(a.v, _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_LT_OQ), _mm512_setzero_ps())};
}
// 2^n of shifted = n + 12582912
ZTOK_LANES Lanes power_of_two(Lanes shifted) {
  const __m512i n = _mm512_add_epi32(_mm512_castps_si512(shifted.v), _mm512_set1_epi32(127 - 0x4B400000));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(n, 23))};
}
ZTOK_LANES Lanes from_ints16(const int32_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_loadu_si512(static_cast<const void*>(p)))};
}

#elif defined(__AVX2__)

struct Lanes {
  __m256 a, b;
};
ZTOK_LANES Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ZTOK_LANES Lanes load16(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ZTOK_LANES Lanes load16(const Half* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
ZTOK_LANES void store16(Half* p, Lanes x) {
  auto* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
ZTOK_LANES void store16(float* p, Lanes x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
ZTOK_LANES Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
ZTOK_LANES Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
ZTOK_LANES Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
ZTOK_LANES Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
ZTOK_LANES Lanes fma(Lanes x, Lanes y, Lanes z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
ZTOK_LANES Lanes larger(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
ZTOK_LANES Lanes smaller_of(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
ZTOK_LANES Lanes negated(Lanes x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign)};
}
ZTOK_LANES Lanes first_lanes(Lanes x, int64_t n) {
  const __m256i count = _mm256_set1_epi32(static_cast<int>(n > kLaneCount ? kLaneCount : n < 0 ? 0 : n));
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm256_and_ps(x.a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, low))),
          _mm256_and_ps(x.b, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, high)))};
}
ZTOK_LANES Lanes zero_below(Lanes x, float limit, Lanes y) {
  const __m256 bound = _mm256_set1_ps(limit);
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.a, bound, _CMP_LT_OQ), y.a),
          _mm256_andnot_ps(_mm256_cmp_ps(x.b, bound, _CMP_LT_OQ), y.b)};
}
ZTOK_LANES __m256 power_of_two8(__m256 shifted) {
  const __m256i n = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127 - 0x4B400000));
  return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}
ZTOK_LANES Lanes power_of_two(Lanes shifted) { return {power_of_two8(shifted.a), power_of_two8(shifted.b)}; }
ZTOK_LANES Lanes from_ints16(const int32_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(q)), _mm256_cvtepi32_ps(_mm256_loadu_si256(q + 1))};
}

#else

struct Lanes {
  float v[kLaneCount];
};
template <typename F>
ZTOK_LANES Lanes each(F&& f) {
  Lanes result;
  for (int i = 0; i < kLaneCount; ++i) result.v[i] = f(i);
  return result;
}
ZTOK_LANES uint32_t word_of(float x) {
  uint32_t word;
  __builtin_memcpy(&word, &x, 4);
  return word;
}
ZTOK_LANES float float_of(uint32_t word) {
  float x;
  __builtin_memcpy(&x, &word, 4);
  return x;
}
ZTOK_LANES Lanes splat(float x) {
  return each([&](int) { return x; });
}
ZTOK_LANES Lanes load16(const float* p) {
  return each([&](int i) { return p[i]; });
}
ZTOK_LANES Lanes load16(const Half* p) {
  return each([&](int i) { return to_float(p[i]); });
}
ZTOK_LANES void store16(float* p, Lanes a) { __builtin_memcpy(p, a.v, sizeof(a.v)); }
ZTOK_LANES void store16(Half* p, Lanes a) {
  for (int i = 0; i < kLaneCount; ++i) p[i] = from_float<Half>(a.v[i]);
}
ZTOK_LANES Lanes operator+(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
ZTOK_LANES Lanes operator-(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
ZTOK_LANES Lanes operator*(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
ZTOK_LANES Lanes operator/(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
// Without a fused instruction this is a call of the C library, which rounds once too, and slow.
ZTOK_LANES Lanes fma(Lanes a, Lanes b, Lanes c) {
  return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
ZTOK_LANES Lanes larger(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
ZTOK_LANES Lanes smaller_of(Lanes a, Lanes b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
ZTOK_LANES Lanes negated(Lanes a) {
  return each([&](int i) { return -a.v[i]; });
}
ZTOK_LANES Lanes first_lanes(Lanes a, int64_t n) {
  return each([&](int i) { return i < n ? a.v[i] : 0.0f; });
}
ZTOK_LANES Lanes zero_below(Lanes x, float limit, Lanes a) {
  return each([&](int i) { return x.v[i] < limit ? 0.0f : a.v[i]; });
}
ZTOK_LANES Lanes power_of_two(Lanes shifted) {
  return each([&](int i) { return float_of((word_of(shifted.v[i]) + 127u - 0x4B400000u) << 23); });
}
ZTOK_LANES Lanes from_ints16(const int32_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}

#endif

// Halves are combined until one lane is left: lane l with lane l + 8, then 4, 2, 1.
#if defined(__AVX2__)
template <typename Combine8, typename Combine4>
ZTOK_LANES float tree(Lanes x, Combine8&& combine8, Combine4&& combine4) {
#if defined(__AVX512F__)
  const __m256 eight = combine8(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
  const __m256 eight = combine8(x.a, x.b);
#endif
  const __m128 four = combine4(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = combine4(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(combine4(two, _mm_movehdup_ps(two)));
}
ZTOK_LANES float tree_sum(Lanes x) {
  return tree(
      x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); }, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
ZTOK_LANES float tree_max(Lanes x) {
  return tree(
      x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); }, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}
#else
ZTOK_LANES float tree_sum(Lanes a) {
  for (int half = kLaneCount / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  }
  return a.v[0];
}
ZTOK_LANES float tree_max(Lanes a) {
  for (int half = kLaneCount / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  }
  return a.v[0];
}
#endif

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, ties to even

ZTOK_LANES Lanes exp16(Lanes x) {
  // In this order of the arguments, what is NaN stays NaN.
  const Lanes clamped = smaller_of(splat(88.0f), larger(splat(-87.0f), x));
  const Lanes shifted = fma(clamped, splat(1.44269504f), splat(kRounder)), n = shifted - splat(kRounder);
  const Lanes r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
  Lanes p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return zero_below(x, -87.0f, (fma(p, r * r, r) + splat(1.0f)) * power_of_two(shifted));
}

ZTOK_LANES Lanes silu16(Lanes g) { return g / (splat(1.0f) + exp16(splat(0.0f) - g)); }

}  // namespace ZTOK_ISA
}  // namespace ztok
