// The CUDA stream that PyTorch is working on.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace ztok {

// Looked up when first needed, not linked: a library linked against libtorch_cuda.so does not load on a CPU-only torch.
cudaStream_t current_stream(int32_t device_index);

// Throws std::runtime_error naming the op when the launch before it was refused. Does not synchronise.
void check_launch(const char* op);

}  // namespace ztok
