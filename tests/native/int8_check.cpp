// One variant of the int8 products against plain integers, with memory of exact size (test_int8_products.py compiles it
// with the address sanitizer). ZTOK_SOURCE is the file of the variant, ZTOK_VARIANT its function.
#include ZTOK_SOURCE

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#ifdef ZTOK_AMX_EMULATION
namespace ztok {
namespace {
void few_rows(const int8_t* rows, int64_t row_stride, int64_t count, const int32_t*, const uint8_t* panels,
              int64_t depth, int64_t num_panels, int32_t* sums, int64_t sums_stride) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < num_panels * 16; ++c) {
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        sum += rows[r * row_stride + k] * (panels[(c / 16 * (depth / 4) + k / 4) * 64 + c % 16 * 4 + k % 4] - 128);
      }
      sums[r * sums_stride + c] = sum;
    }
  }
}
}  // namespace
Int8Products int8_products_avx512_vnni() { return few_rows; }
}  // namespace ztok
#endif

namespace {

int check(std::mt19937& random, int64_t rows, int64_t depth, int64_t panels, bool extreme) {
  const int64_t columns = panels * 16, row_stride = depth + 5, sums_stride = columns + 3;
  std::vector<int8_t> x((rows - 1) * row_stride + depth), weight(columns * depth);
  std::vector<uint8_t> packed(columns * depth);
  std::vector<int32_t> row_sums(rows), sums((rows - 1) * sums_stride + columns, 12345);
  const auto draw = [&] { return static_cast<int8_t>(extreme ? 127 : static_cast<int>(random() % 255) - 127); };
  for (auto& value : x) value = draw();
  const int sign = random() % 2 ? 1 : -1;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t k = 0; k < depth; ++k) {
      weight[c * depth + k] = static_cast<int8_t>(sign * draw());
      packed[(c / 16 * (depth / 4) + k / 4) * 64 + c % 16 * 4 + k % 4] = weight[c * depth + k] + 128;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < depth; ++k) row_sums[r] += x[r * row_stride + k];
  }
  ztok::ZTOK_VARIANT()(x.data(), row_stride, rows, row_sums.data(), packed.data(), depth, panels, sums.data(),
                       sums_stride);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < sums_stride && r * sums_stride + c < static_cast<int64_t>(sums.size()); ++c) {
      int32_t expected = c < columns ? 0 : 12345;
      for (int64_t k = 0; c < columns && k < depth; ++k) expected += x[r * row_stride + k] * weight[c * depth + k];
      if (sums[r * sums_stride + c] != expected) {
        std::printf("rows %ld depth %ld panels %ld: row %ld column %ld is %d, expected %d\n", long(rows), long(depth),
                    long(panels), long(r), long(c), sums[r * sums_stride + c], expected);
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int failures = 0;
  for (int64_t rows = 1; rows <= 66; rows += rows < 40 ? 1 : 5) {
    for (int64_t panels = 1; panels <= 4; ++panels) {
      failures += check(random, rows, 64 * (1 + static_cast<int64_t>(random() % 3)), panels, false);
    }
  }
  for (int64_t rows : {1, 5, 17}) failures += check(random, rows, 65536, 1, true);  // the largest sums
  return failures > 0;
}
