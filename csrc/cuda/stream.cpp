#include "stream.h"

#include <dlfcn.h>

#include "check.h"

namespace ztok {
namespace {

using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

CurrentStream find_current_stream() {
  // RTLD_NOLOAD: torch has loaded it already, or there is no CUDA torch. RTLD_DEFAULT does not find the symbol,
  // because Python loads extension modules with local scope.
  void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (torch_cuda == nullptr) fail("current_stream", "libtorch_cuda.so is not loaded: this torch has no CUDA support");
  void* symbol = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
  if (symbol == nullptr) {
    fail("current_stream", "libtorch_cuda.so lacks aoti_torch_get_current_cuda_stream: expected torch >= 2.11");
  }
  return reinterpret_cast<CurrentStream>(symbol);
}

}  // namespace

cudaStream_t current_stream(int32_t device_index) {
  static const CurrentStream lookup = find_current_stream();
  void* stream = nullptr;
  if (lookup(device_index, &stream) != 0) fail("current_stream", "no current stream on CUDA device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) fail(op, "CUDA refused the launch: ", cudaGetErrorString(error));
}

}  // namespace ztok
