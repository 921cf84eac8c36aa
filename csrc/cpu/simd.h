// One vector of floats per instruction set, for kernel files only (see isa.h). The names are the same for all of them;
// `kWidth` lanes differ: 4 (GCC vector extensions: SSE2, NEON or what else there is), 8 (AVX2), 16 (AVX-512).
//
//   load, load_first(p, n)      from float, Half or BFloat16, unaligned; the n first lanes, the others 0 and not read
//   store, store_first(p, v, n) to the same types, rounded to nearest even; the n first lanes, the others not written
//   + - * /  fma(a, b, c) = a*b + c   min, max, sqrt (IEEE); min and max give b where a lane is NaN
//   a >= b, a > b -> Mask; select(mask, a, b); any(mask); bits(mask): lane i is bit i
//   Ints: 32-bit lanes, ints(i), lane_numbers(), +, select, store
//   reduce_add, reduce_max: over the lanes, in the fixed order of a tree of halves
//   sums_of(rows): lane i is the sum of the lanes of rows[i], for kWidth vectors
//   transpose(rows): a square of kWidth vectors, in place
//
// Kernels are compiled with -ffp-contract=off: only fma() fuses. The baseline on x86 has no fused instruction, there
// fma() rounds twice.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace ztok {

// Storage formats, read and written by their bits.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace ZTOK_ISA {

#if defined(__AVX512F__)
#include "simd_avx512.inc"
#elif defined(__AVX2__)
#include "simd_avx2.inc"
#else
#include "simd_baseline.inc"
#endif

inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }

inline Vec load_first(const Half* p, int n) {
  Half lanes[kWidth] = {};
  std::memcpy(lanes, p, n * sizeof(Half));
  return load(lanes);
}

inline Vec load_first(const BFloat16* p, int n) {
  BFloat16 lanes[kWidth] = {};
  std::memcpy(lanes, p, n * sizeof(BFloat16));
  return load(lanes);
}

inline void store_first(Half* p, Vec v, int n) {
  Half lanes[kWidth];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(Half));
}

inline void store_first(BFloat16* p, Vec v, int n) {
  BFloat16 lanes[kWidth];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(BFloat16));
}

// One element, whatever its format.
template <typename T>
inline float to_float(T value) {
  alignas(64) float lanes[kWidth];
  store(lanes, load_first(&value, 1));
  return lanes[0];
}
inline float to_float(float value) { return value; }

template <typename T>
inline T from_float(float value) {
  T result;
  store_first(&result, broadcast(value), 1);
  return result;
}
template <>
inline float from_float<float>(float value) {
  return value;
}

}  // namespace ZTOK_ISA
}  // namespace ztok
