// The LoRA decode kernels run on the host: their launcher without CUDA, for a machine with a given number of
// multiprocessors. Called by test_lora_decode.py through ctypes.
#define ZTOK_HOST_EMULATION
#include <algorithm>
#include <array>

#include "../faults.h"
#include "lora_decode_kernel.cuh"

namespace {

using namespace ztok;

template <typename T, typename AdapterT>
void shrink(const LoraDecode& d, int64_t tiles, bool aligned, uint32_t seed) {
  const dim3 grid(d.num_adapters * ceil_div(d.rank, kShrinkRanks), ceil_div(d.rows, kShrinkRows));
  host::launch(grid, dim3(32 * kLoraWarps), 0, seed, [&] {
    aligned ? lora_shrink_kernel<T, AdapterT, true>(d, tiles) : lora_shrink_kernel<T, AdapterT, false>(d, tiles);
  });
}

template <typename T, int kRowTiles, bool kAligned>
int64_t run(LoraDecode d, int multiprocessors, int splits, float* scratch, int64_t scratch_floats, uint32_t seed) {
  using Shape = LoraShape<sizeof(T) == 2, kRowTiles>;
  LoraPlan plan = lora_plan<Shape>(d.rows, d.in, d.out, d.rank, multiprocessors);
  if (splits > 0) {
    const int64_t steps = ceil_div(d.in, Shape::kChunk * Shape::kChunksPerStep);
    plan.splits = splits;
    plan.steps_per_split = ceil_div(steps, splits);
    plan.scratch_floats += plan.tiles * splits * Shape::kTileFloats;
  }
  if (plan.scratch_floats != scratch_floats) return -plan.scratch_floats;
  place_scratch(d, plan, scratch);
  if (d.float_adapters) {
    shrink<T, float>(d, plan.tiles, kAligned, seed);
  } else {
    shrink<T, T>(d, plan.tiles, kAligned, seed);
  }
  const int64_t steps = ceil_div(d.in, Shape::kChunk * Shape::kChunksPerStep);
  host::launch(dim3(plan.tiles, plan.splits), dim3(32 * kLoraWarps), Shape::kSharedBytes, seed + 1,
               [&] { lora_decode_kernel<T, kRowTiles, kAligned>(d, steps, plan.steps_per_split); });
  return plan.splits;
}

template <typename T>
int64_t dispatch(const LoraDecode& d, int row_tiles, bool aligned, int multiprocessors, int splits, float* scratch,
                 int64_t scratch_floats, uint32_t seed) {
  if (!aligned) return run<T, 8, false>(d, multiprocessors, splits, scratch, scratch_floats, seed);
  if (row_tiles == 1) return run<T, 1, true>(d, multiprocessors, splits, scratch, scratch_floats, seed);
  if constexpr (sizeof(T) == 2) {
    if (row_tiles == 2) return run<T, 2, true>(d, multiprocessors, splits, scratch, scratch_floats, seed);
    if (row_tiles == 4) return run<T, 4, true>(d, multiprocessors, splits, scratch, scratch_floats, seed);
  }
  return run<T, 8, true>(d, multiprocessors, splits, scratch, scratch_floats, seed);
}

}  // namespace

extern "C" {

// The fields of LoraDecode that come from tensors, in its order.
struct Arguments {
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const void *bias, *A, *B;
  const float* scaling;
  const int32_t* adapters;
  const void* cu_seqlens;
  int64_t sequences, rows, num_adapters, rank, in, out;
  void* y;
};

// dtype: 0 bfloat16, 1 float16, 2 float32. splits: 0 lets the plan decide. Returns the splits, or, when
// `scratch_floats` is another number, minus what is needed. `fault`: 0, or the address of an access out of bounds,
// which ended the run.
int64_t lora_decode_on_host(const Arguments* a, int dtype, bool float_adapters, bool wide_offsets, bool aligned,
                            bool aligned_B, int row_tiles, int multiprocessors, int splits, float* scratch,
                            int64_t scratch_floats, uint32_t seed, uint64_t* fault) {
  LoraDecode d = {};
  d.x = a->x;
  d.x_stride = a->x_stride;
  d.weight = a->weight;
  d.weight_stride = a->weight_stride;
  d.bias = a->bias;
  d.A = a->A;
  d.B = a->B;
  d.float_adapters = float_adapters;
  d.aligned_B = aligned_B;
  d.scaling = a->scaling;
  d.adapters = a->adapters;
  d.cu_seqlens = a->cu_seqlens;
  d.wide_offsets = wide_offsets;
  d.sequences = a->sequences;
  d.rows = static_cast<int>(a->rows);
  d.num_adapters = static_cast<int>(a->num_adapters);
  d.rank = static_cast<int>(a->rank);
  d.in = a->in;
  d.out = a->out;
  d.y = a->y;
  int64_t used = 0;
  *fault = host::faulting_address([&] {
    const auto go = dtype == 0 ? dispatch<__nv_bfloat16> : dtype == 1 ? dispatch<__half> : dispatch<float>;
    used = go(d, row_tiles, aligned, multiprocessors, splits, scratch, scratch_floats, seed);
  });
  return used;
}
}
