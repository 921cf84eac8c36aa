// x Wᵀ of one warp of the LoRA decode kernel: the part that decides its speed. W is read once, 16 bytes at a time,
// straight from global memory into registers; no shared memory, no barrier.
//
// A warp takes 32 outputs x 8 kTiles rows. In one chunk of the input, lane 4 g + q reads 16 bytes of the weights of
// outputs g, g + 8, g + 16, g + 24 and of x rows g, g + 8, ..., at chunk + q vectors: the four lanes of a group read 64
// consecutive bytes. Which input a lane's element stands for does not matter to a sum over inputs, as long as W and x
// agree; so the four 32-bit words of a vector serve, as they were loaded, as the fragments of two m16n8k16 products.
#pragma once

#include "device.cuh"

namespace ztok {

// [2 x 16 outputs][8 rows each][fragment]: element i of lane 4 g + q is output g + 8 (i / 2), row 2 q + i % 2.
template <int kTiles>
using LoraSums = float[2][kTiles][4];

// Weights of one chunk: outputs g, g + 8, g + 16, g + 24.
template <typename T>
using LoraWeights = Vector<T>[4];

// Half precision: tensor cores. Also for one row, where 7 of 8 columns are wasted: the memory sets the pace.
template <typename T, int kTiles>
struct LoraProduct {
  LoraSums<kTiles> sums = {};

  // x: row `group` of the first tile at this lane's vector; rows: how many there are from the first of the warp.
  template <bool kAligned>
  __device__ __forceinline__ void add(const LoraWeights<T>& w, const T* x, int64_t x_stride, int rows, int64_t k,
                                      int64_t in, int lane) {
    const int group = lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = 8 * tile + group;
      Vector<T> v;
      if (row < rows) v = load_vector<T, kAligned, false>(x + row * x_stride, k, in);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const Vector<T>&low = w[2 * f], &high = w[2 * f + 1];
        mma_16x8x16(T{}, sums[f][tile], {low.words[0], high.words[0], low.words[1], high.words[1]},
                    {v.words[0], v.words[1]});
        mma_16x8x16(T{}, sums[f][tile], {low.words[2], high.words[2], low.words[3], high.words[3]},
                    {v.words[2], v.words[3]});
      }
    }
  }

  __device__ __forceinline__ void finish(int) {}
};

// float32: the tensor cores would round the input, so every lane multiplies its own inputs for all rows, and the four
// lanes of a group add up at the end.
template <int kTiles>
struct LoraProduct<float, kTiles> {
  LoraSums<kTiles> sums;
  float own[4][8 * kTiles] = {};  // [output g + 8 f][row]

  template <bool kAligned>
  __device__ __forceinline__ void add(const LoraWeights<float>& w, const float* x, int64_t x_stride, int rows,
                                      int64_t k, int64_t in, int) {
#pragma unroll
    for (int row = 0; row < 8 * kTiles; ++row) {
      Vector<float> v;
      if (row < rows) v = load_vector<float, kAligned, false>(x + row * x_stride, k, in);
#pragma unroll
      for (int f = 0; f < 4; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) own[f][row] += w[f][i] * v[i];
      }
    }
  }

  // Lane q of a group keeps rows 2 q and 2 q + 1 of each tile, as a tensor-core fragment would.
  __device__ __forceinline__ void finish(int lane) {
    const bool upper_pair = lane & 2, upper = lane & 1;
#pragma unroll
    for (int f = 0; f < 4; ++f) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float* rows = own[f] + 8 * tile;
        float half[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          half[i] = (upper_pair ? rows[i + 4] : rows[i]) + shuffle_xor(upper_pair ? rows[i] : rows[i + 4], 2);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[f / 2][tile][f % 2 * 2 + i] =
              (upper ? half[i + 2] : half[i]) + shuffle_xor(upper ? half[i] : half[i + 2], 1);
        }
      }
    }
  }
};

// Steps first, first + stride, ... below last; a step is kChunksPerStep chunks, consecutive in memory, whose loads are
// all issued before the first is used.
template <typename T, int kTiles, int kChunksPerStep, bool kAligned>
__device__ __forceinline__ void lora_base_product(LoraProduct<T, kTiles>& product, const T* weight,
                                                  int64_t weight_stride, int64_t outputs, const T* x, int64_t x_stride,
                                                  int rows, int64_t in, int64_t first, int64_t last, int64_t stride,
                                                  int lane) {
  constexpr int kVector = Vector<T>::kSize;
  const int group = lane / 4, quad = lane % 4;
  for (int64_t step = first; step < last; step += stride) {
    const int64_t begin = step * (kChunksPerStep * 4 * kVector) + quad * kVector;
    LoraWeights<T> w[kChunksPerStep];
#pragma unroll
    for (int chunk = 0; chunk < kChunksPerStep; ++chunk) {
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const int output = group + 8 * f;
        if (output < outputs) {
          const T* row = weight + output * weight_stride;
          w[chunk][f] = load_vector<T, kAligned, true>(row, begin + chunk * 4 * kVector, in);
        }
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunksPerStep; ++chunk) {
      product.template add<kAligned>(w[chunk], x, x_stride, rows, begin + chunk * 4 * kVector, in, lane);
    }
  }
  product.finish(lane);
}

}  // namespace ztok
