#include "quantize_kernel.h"

#include "simd.h"

namespace ztok {
namespace ZTOK_ISA {
namespace {

template <typename Code, typename Sum>
void sum_rows(const Matrix& book, int64_t levels, int64_t level_stride, const int32_t* codes, int64_t begin,
              int64_t end, Sum* sums) {
  const auto* first = static_cast<const Code*>(book.data);
  for (int64_t row = begin; row < end; ++row) {
    Sum* target = sums + row * book.width;
    for (int64_t k = 0; k < book.width; k += kWidth) {
      const int lanes = static_cast<int>(smaller(kWidth, book.width - k));
      Vec sum = zeros();
      for (int64_t l = 0; l < levels; ++l) {
        const int32_t code = codes[row * levels + l];
        if (code < 0) continue;
        const Code* chosen = first + l * level_stride + code * book.stride + k;
        sum = sum + (lanes == kWidth ? load(chosen) : load_first(chosen, lanes));
      }
      if (lanes == kWidth) {
        store(target + k, sum);
      } else {
        store_first(target + k, sum, lanes);
      }
    }
  }
}

template <typename Code>
void sum_as(const Matrix& book, int64_t levels, int64_t level_stride, const int32_t* codes, int64_t begin, int64_t end,
            void* sums, Element element) {
  switch (element) {
    case Element::float16:
      return sum_rows<Code>(book, levels, level_stride, codes, begin, end, static_cast<Half*>(sums));
    case Element::bfloat16:
      return sum_rows<Code>(book, levels, level_stride, codes, begin, end, static_cast<BFloat16*>(sums));
    default:
      return sum_rows<Code>(book, levels, level_stride, codes, begin, end, static_cast<float*>(sums));
  }
}

}  // namespace

void sum_codes(const Matrix& book, int64_t levels, int64_t level_stride, const int32_t* codes, int64_t begin,
               int64_t end, void* sums, Element sums_element) {
  switch (book.element) {
    case Element::float16:
      return sum_as<Half>(book, levels, level_stride, codes, begin, end, sums, sums_element);
    case Element::bfloat16:
      return sum_as<BFloat16>(book, levels, level_stride, codes, begin, end, sums, sums_element);
    default:
      return sum_as<float>(book, levels, level_stride, codes, begin, end, sums, sums_element);
  }
}

}  // namespace ZTOK_ISA
}  // namespace ztok
