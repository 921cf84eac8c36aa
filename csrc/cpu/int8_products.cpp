#include "int8_products.h"

#include <atomic>
#include <initializer_list>

#include <torch/csrc/stable/library.h>

#include "isa.h"

#ifdef ZTOK_X86_KERNELS
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ztok {
namespace {

void plain_products(const int8_t* rows, int64_t row_stride, int64_t count, const int32_t* row_sums,
                    const uint8_t* panels, int64_t depth, int64_t num_panels, int32_t* sums, int64_t sums_stride) {
  for (int64_t panel = 0; panel < num_panels; ++panel, panels += depth * kPanelColumns) {
    for (int64_t row = 0; row < count; ++row) {
      const int8_t* x = rows + row * row_stride;
      // unsigned: sums may wrap around on the way, the result fits
      const uint32_t less = 128u * static_cast<uint32_t>(row_sums[row]);
      uint32_t total[kPanelColumns];
      for (auto& sum : total) sum = 0u - less;
      for (int64_t k = 0; k < depth; k += 4) {
        const uint8_t* w = panels + k * kPanelColumns;
        for (int64_t c = 0; c < kPanelColumns; ++c) {
          int32_t quad = 0;
          for (int i = 0; i < 4; ++i) quad += x[k + i] * w[4 * c + i];
          total[c] += static_cast<uint32_t>(quad);
        }
      }
      int32_t* to = sums + row * sums_stride + panel * kPanelColumns;
      for (int64_t c = 0; c < kPanelColumns; ++c) to[c] = static_cast<int32_t>(total[c]);
    }
  }
}

Int8Products compiled(Int8Isa wanted) {
  switch (wanted) {
    case Int8Isa::plain:
      return plain_products;
    case Int8Isa::avx2:
      return int8_products_avx2();
    case Int8Isa::avx_vnni:
      return int8_products_avx_vnni();
    case Int8Isa::avx512:
      return int8_products_avx512();
    case Int8Isa::avx512_vnni:
      return int8_products_avx512_vnni();
    case Int8Isa::amx:
      return int8_products_amx();
  }
  return nullptr;
}

#ifdef ZTOK_X86_KERNELS
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid cpuid(unsigned leaf, unsigned subleaf) {
  Cpuid result;
  if (!__get_cpuid_count(leaf, subleaf, &result.eax, &result.ebx, &result.ecx, &result.edx)) return {};
  return result;
}

// Linux saves the tiles of a process only if it has asked for it.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h: ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool processor_has(Int8Isa wanted) {
  // __builtin_cpu_supports asks the operating system too. It does not know AVX-VNNI and AMX in every compiler.
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (wanted) {
    case Int8Isa::plain:
      return true;
    case Int8Isa::avx2:
      return avx2;
    case Int8Isa::avx_vnni:
      return avx2 && (cpuid(7, 1).eax >> 4 & 1);
    case Int8Isa::avx512:
      return avx512;
    case Int8Isa::avx512_vnni:
      return vnni;
    case Int8Isa::amx:
      return vnni && (cpuid(7, 0).edx >> 24 & 3) == 3 && may_use_tiles();  // AMX-TILE and AMX-INT8
  }
  return false;
}
#else
bool processor_has(Int8Isa wanted) { return wanted == Int8Isa::plain; }
#endif

constexpr int kIsas = 6;

struct Available {
  Int8Products products[kIsas];
};

const Available& available() {
  static const Available value = [] {
    Available found{};
    for (int i = 0; i < kIsas; ++i) {
      const auto candidate = static_cast<Int8Isa>(i);
      if (processor_has(candidate)) found.products[i] = compiled(candidate);
    }
    return found;
  }();
  return value;
}

constexpr int kAutomatic = -1;

std::atomic<int>& forced() {
  static std::atomic<int> value{kAutomatic};
  return value;
}

int in_use() {
  const int wanted = forced().load(std::memory_order_relaxed);
  if (wanted != kAutomatic) return wanted;
  const auto best = [](std::initializer_list<Int8Isa> candidates) {
    for (Int8Isa candidate : candidates) {
      if (available().products[static_cast<int>(candidate)] != nullptr) return static_cast<int>(candidate);
    }
    return static_cast<int>(Int8Isa::plain);
  };
  switch (isa()) {
    case Isa::avx512:
      return best({Int8Isa::amx, Int8Isa::avx512_vnni, Int8Isa::avx512});
    case Isa::avx2:
      return best({Int8Isa::avx_vnni, Int8Isa::avx2});
    default:
      return static_cast<int>(Int8Isa::plain);
  }
}

// For tests: uses Int8Isa `wanted` from now on where it is available, -1: again the best for the instruction set that
// isa_native says. Returns the one in use.
int64_t int8_isa_native(int64_t wanted) {
  if (wanted == kAutomatic || (wanted >= 0 && wanted < kIsas && available().products[wanted] != nullptr)) {
    forced().store(static_cast<int>(wanted), std::memory_order_relaxed);
  }
  return in_use();
}

}  // namespace

Int8Products int8_products() { return available().products[in_use()]; }

}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) { m.def("int8_isa_native(int wanted) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(ztok, CompositeExplicitAutograd, m) {
  m.impl("int8_isa_native", TORCH_BOX(&ztok::int8_isa_native));
}
