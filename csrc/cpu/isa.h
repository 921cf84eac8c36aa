// Kernels compiled once per instruction set, chosen at run time.
//
// To add a kernel `foo`:
//   1. foo_kernel.h   ZTOK_KERNEL(void, foo_rows, const float* in, float* out, int64_t n);   inside namespace ztok
//   2. foo_kernel.cpp #include "foo_kernel.h" and "simd.h"; define foo_rows inside
//                     namespace ztok { namespace ZTOK_ISA { ... } }, helpers in an unnamed namespace in there;
//                     list the file in ZTOK_CPU_KERNELS of CMakeLists.txt, which compiles it once per instruction set
//   3. foo.cpp        ZTOK_SELECT(foo_rows)(in, out, n), ordinary code without SIMD
//
// A kernel file must not share inline functions with anything: the linker keeps one copy of each, and it may be the one
// with AVX-512 instructions. So: no standard containers or algorithms, no torch headers, no inline function or template
// outside of namespace ZTOK_ISA; memory comes from the caller. tests/native/test_simd.py checks it.
#pragma once

#include <cstdint>

namespace ztok {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best one that was compiled and that this processor has; looked up once.
Isa isa();

// Uses another one from now on, for tests (from Python: torch.ops.ztok.isa_native). Returns false, and changes nothing,
// where it is not available.
bool set_isa(Isa wanted);

}  // namespace ztok

// ZTOK_X86_KERNELS comes from CMakeLists.txt.
#ifdef ZTOK_X86_KERNELS
#define ZTOK_KERNEL(returns, name, ...) \
  namespace baseline {                  \
  returns name(__VA_ARGS__);            \
  }                                     \
  namespace avx2 {                      \
  returns name(__VA_ARGS__);            \
  }                                     \
  namespace avx512 {                    \
  returns name(__VA_ARGS__);            \
  }
#define ZTOK_SELECT(name)                                       \
  (::ztok::isa() == ::ztok::Isa::avx512 ? &::ztok::avx512::name \
   : ::ztok::isa() == ::ztok::Isa::avx2 ? &::ztok::avx2::name   \
                                        : &::ztok::baseline::name)
#else
#define ZTOK_KERNEL(returns, name, ...) \
  namespace baseline {                  \
  returns name(__VA_ARGS__);            \
  }
#define ZTOK_SELECT(name) (&::ztok::baseline::name)
#endif
