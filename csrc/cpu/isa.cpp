#include "isa.h"

#include <atomic>
#include <initializer_list>

#include <torch/csrc/stable/library.h>

namespace ztok {
namespace {

bool available(Isa wanted) {
  switch (wanted) {
    case Isa::baseline:
      return true;
#ifdef ZTOK_X86_KERNELS
    // These ask the operating system too (XGETBV), so a kernel that does not save the wide registers is noticed.
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    default:
      return false;
  }
}

Isa best() {
  for (Isa candidate : {Isa::avx512, Isa::avx2}) {
    if (available(candidate)) return candidate;
  }
  return Isa::baseline;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{best()};
  return value;
}

// For tests: uses `wanted` from now on if that is the number of an instruction set available here; returns the one in
// use.
int64_t isa_native(int64_t wanted) {
  if (wanted >= 0 && wanted <= static_cast<int64_t>(Isa::avx512)) set_isa(static_cast<Isa>(wanted));
  return static_cast<int64_t>(isa());
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(Isa wanted) {
  if (!available(wanted)) return false;
  current().store(wanted, std::memory_order_relaxed);
  return true;
}

}  // namespace ztok

STABLE_TORCH_LIBRARY_FRAGMENT(ztok, m) { m.def("isa_native(int wanted) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(ztok, CompositeExplicitAutograd, m) { m.impl("isa_native", TORCH_BOX(&ztok::isa_native)); }
