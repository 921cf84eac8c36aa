// Every operation of csrc/cpu/simd.h against plain scalar code; compiled by test_simd.py once per instruction set.
// Prints what is wrong and exits with 1.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>

#include "isa.h"
#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

void fail(int line, const char* condition) {
  std::printf("line %d: %s\n", line, condition);
  std::exit(1);
}

#define EXPECT(condition) ((condition) ? void() : fail(__LINE__, #condition))

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

float lane(Vec v, int i) {
  float lanes[kWidth];
  store(lanes, v);
  return lanes[i];
}

float from_bits(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}

float half_value(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 0x3ff;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? kNaN : sign * kInf;
  return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24));
}

// Of the two neighbours in a 16-bit format, ordered as sign and magnitude, the nearer one, of equals the even one.
template <typename T>
void check_rounding(float x, float (*value)(uint16_t), float largest) {
  const uint16_t got = from_float<T>(x).bits;
  if (std::isnan(x)) return EXPECT(std::isnan(value(got)));
  const double magnitude = std::fabs(double(x));
  EXPECT(std::signbit(value(got)) == std::signbit(x));
  if (!std::isfinite(value(got))) return EXPECT(magnitude >= largest);
  const double error = std::fabs(double(value(got)) - x);
  for (int step : {-1, 1}) {
    const int neighbour = (got & 0x7fff) + step;
    if (neighbour < 0) continue;
    const double other = std::fabs(std::fabs(double(value(uint16_t(neighbour)))) - magnitude);
    EXPECT(error < other || (error == other && (got & 1) == 0));
  }
}

float bfloat_value(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

void check_formats() {
  for (uint32_t word = 0; word < 0x10000; ++word) {
    const Half half[kWidth] = {{uint16_t(word)}};
    const BFloat16 bfloat[kWidth] = {{uint16_t(word)}};
    const float expected = half_value(uint16_t(word));
    EXPECT(to_bits(lane(load(half), 0)) == to_bits(expected) || std::isnan(expected));
    EXPECT(to_bits(to_float(bfloat[0])) == word << 16);
    if (!std::isnan(expected)) EXPECT(from_float<Half>(expected).bits == word);
    if (!std::isnan(to_float(bfloat[0]))) EXPECT(from_float<BFloat16>(to_float(bfloat[0])).bits == word);
  }
  uint32_t word = 1;
  for (int i = 0; i < 200000; ++i, word = word * 1664525u + 1013904223u) {
    check_rounding<Half>(from_bits(word), half_value, 65519.99f);
    // most of all floats are outside of the range of half; these are not
    check_rounding<Half>(from_bits((word & 0x8fffffffu) | 0x30000000u), half_value, 65519.99f);
    check_rounding<BFloat16>(from_bits(word), bfloat_value, 3.39e38f);
  }
  for (float tie : {65504.0f, 65519.0f, 65520.0f, 0x1p-24f, 0x1p-25f, 0x1.8p-24f, 1.0f + 0x1p-11f, 1.0f + 0x3p-11f}) {
    check_rounding<Half>(tie, half_value, 65519.99f);
    check_rounding<Half>(-tie, half_value, 65519.99f);
  }
}

template <typename T>
void check_parts() {
  T memory[3 * kWidth];
  for (int n = 0; n <= kWidth; ++n) {
    for (int i = 0; i < 3 * kWidth; ++i) memory[i] = from_float<T>(float(i + 1));
    for (int i = 0; i < kWidth; ++i) EXPECT(lane(load_first(memory + 1, n), i) == (i < n ? i + 2 : 0));
    store_first(memory + kWidth, broadcast(-1.0f), n);
    for (int i = 0; i < 3 * kWidth; ++i) {
      EXPECT(to_float(memory[i]) == (i >= kWidth && i < kWidth + n ? -1.0f : float(i + 1)));
    }
    // One float past the end of readable memory must not be touched: the caller's last row ends there.
    EXPECT(lane(load_first(memory + 3 * kWidth - n, n), 0) == (n ? float(3 * kWidth - n + 1) : 0.0f));
  }
}

void check_arithmetic() {
  float a[kWidth], b[kWidth], c[kWidth];
  for (int i = 0; i < kWidth; ++i) a[i] = 1.5f * i - 3, b[i] = 4.0f - i, c[i] = 0.25f * i;
  const Vec x = load(a), y = load(b), z = load(c);
  int32_t numbers[kWidth];
  store(numbers, select(x >= y, lane_numbers() + ints(10), ints(-1)));
  float sum = 0, largest = -kInf;
  for (int i = 0; i < kWidth; ++i) {
    EXPECT(lane(x + y, i) == a[i] + b[i] && lane(x - y, i) == a[i] - b[i] && lane(x * y, i) == a[i] * b[i]);
    EXPECT(lane(z / broadcast(2.0f), i) == c[i] / 2 && lane(fma(x, y, z), i) == a[i] * b[i] + c[i]);
    EXPECT(lane(min(x, y), i) == (a[i] < b[i] ? a[i] : b[i]) && lane(max(x, y), i) == (a[i] > b[i] ? a[i] : b[i]));
    EXPECT(lane(sqrt(z), i) == std::sqrt(c[i]) && lane(select(x > y, x, z), i) == (a[i] > b[i] ? a[i] : c[i]));
    EXPECT(((bits(x >= y) >> i) & 1) == (a[i] >= b[i]) && ((bits(x > y) >> i) & 1) == (a[i] > b[i]));
    EXPECT(numbers[i] == (a[i] >= b[i] ? 10 + i : -1));
    sum += a[i];
    largest = a[i] > largest ? a[i] : largest;
  }
  EXPECT(reduce_add(x) == sum && reduce_max(x) == largest);
  EXPECT(!any(zeros() > zeros()) && any(zeros() >= zeros()) && bits(zeros() >= zeros()) == (1ull << kWidth) - 1);
  EXPECT(!any(broadcast(kNaN) >= broadcast(kNaN)) && any((x > y) | (y > x)));
  EXPECT(lane(min(broadcast(kNaN), broadcast(1)), 0) == 1 && lane(max(broadcast(kNaN), broadcast(1)), 0) == 1);
  Vec square[kWidth];
  for (int i = 0; i < kWidth; ++i) square[i] = broadcast(100.0f * i) + x;
  transpose(square);
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) EXPECT(lane(square[i], j) == 100.0f * j + a[i]);
  }
  Vec total = zeros();
  total += x;
  EXPECT(lane(total, kWidth - 1) == a[kWidth - 1]);
}

}  // namespace
}  // namespace ZTOK_ISA
}  // namespace ztok

int main() {
  using namespace ztok::ZTOK_ISA;
  check_formats();
  check_parts<float>();
  check_parts<ztok::Half>();
  check_parts<ztok::BFloat16>();
  check_arithmetic();
}
