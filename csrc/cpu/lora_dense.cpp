// The base product of lora_linear by torch, which hands bfloat16 to oneDNN.
//
// On a processor with bfloat16 dot products (AVX512-BF16, AMX) oneDNN multiplies it several times faster than the
// kernels here, which widen it to float32. float32 and float16 stay here: docs/kernels.md has the times.
#include "lora.h"
#include "torch_products.h"

#ifdef ZTOK_X86_KERNELS
#include <cpuid.h>
#endif

namespace ztok {
namespace {

// Estimates. Below either one the kernels here should be as fast: they write y once, and have no call to pay for.
constexpr int64_t kDenseRows = 16;
constexpr int64_t kDenseProducts = 20 << 20;

#ifdef ZTOK_X86_KERNELS
bool multiplies_bfloat16() {
  static const bool value = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
    const bool avx512 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
    return amx || avx512;
  }();
  // Not where tests have chosen an older instruction set.
  return value && isa() == Isa::avx512;
}
#else
bool multiplies_bfloat16() { return false; }
#endif

}  // namespace

bool lora_dense_is_torchs(Element element, int64_t rows, int64_t depth, int64_t columns) {
  return element == Element::bfloat16 && rows >= kDenseRows && rows * depth * columns >= kDenseProducts &&
         multiplies_bfloat16();
}

void lora_dense_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Tensor& y) {
  using torch::stable::detail::from;
  call_out<4>("aten::linear", {from(x), from(weight), from(bias), from(y)});
}

}  // namespace ztok
