// The few device primitives that the LoRA kernels need beyond CUDA C++ itself, and nothing else of the machine: a test
// that defines ZTOK_HOST_EMULATION supplies them as plain C++ and so runs the kernels, unchanged, on the host.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if defined(ZTOK_HOST_EMULATION)
#include "host_emulation.h"
#else

namespace ztok {

// Dynamic shared memory of the block.
__device__ __forceinline__ float* shared_floats() {
  extern __shared__ __align__(16) float ztok_shared_floats[];
  return ztok_shared_floats;
}

// 16 bytes that are read once: through the read-only path, without taking a line of the L1 cache from what is reused.
__device__ __forceinline__ uint4 load_streaming(const void* address) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
  return v;
}

// 16 bytes that other warps of the block read as well.
__device__ __forceinline__ uint4 load_cached(const void* address) { return __ldg(static_cast<const uint4*>(address)); }

// From L2: what another block or another kernel wrote while this one was running already.
__device__ __forceinline__ float load_shared_between_blocks(const float* address) { return __ldcg(address); }

__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// c[16 x 8] += a[16 x 16] b[16 x 8]; fragments as the PTX manual lays out mma.m16n8k16.
__device__ __forceinline__ void mma_16x8x16(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16(__half, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Programmatic dependent launch (compute capability 9.0): the next kernel of the stream may begin, and in it, wait
// until the kernel before has finished and its writes are visible. Without it kernels run one after another anyway.
__device__ __forceinline__ void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace ztok

#endif  // ZTOK_HOST_EMULATION

namespace ztok {

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

// 16 bytes as elements of T, kept as words: an array of 16-bit elements would live in local memory.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);
  static constexpr int kPerWord = 4 / sizeof(T);
  uint32_t words[4] = {0, 0, 0, 0};

  __device__ __forceinline__ void set(uint4 v) {
    words[0] = v.x;
    words[1] = v.y;
    words[2] = v.z;
    words[3] = v.w;
  }

  __device__ __forceinline__ float operator[](int i) const {
    const uint32_t word = words[i / kPerWord];
    if constexpr (std::is_same_v<T, float>) return float_of_bits(word);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) return float_of_bits(i % 2 ? word & 0xffff0000u : word << 16);
    if constexpr (std::is_same_v<T, __half>) {
      __half_raw half;
      half.x = static_cast<uint16_t>(i % 2 ? word >> 16 : word);
      return __half2float(half);
    }
  }
};

// Elements [first, first + kSize) of a row of `length`, zero past its end. Aligned: the row begins on 16 bytes and
// `length` is a multiple of kSize, so the vector is inside or outside as a whole. Otherwise element by element.
template <typename T, bool kAligned, bool kStreaming>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t first, int64_t length) {
  Vector<T> v;
  if constexpr (kAligned) {
    if (first < length) v.set(kStreaming ? load_streaming(row + first) : load_cached(row + first));
  } else {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
#pragma unroll
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      const uint32_t bits = first + i < length ? reinterpret_cast<const Bits*>(row)[first + i] : 0;
      v.words[i / Vector<T>::kPerWord] |= bits << (i % Vector<T>::kPerWord * 16);
    }
  }
  return v;
}

}  // namespace ztok
