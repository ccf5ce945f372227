#include "launch.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace sgld {

cudaStream_t current_stream(const char* op, int32_t device_index) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  // RTLD_NOLOAD: the copy that torch itself has loaded, or none. Asking that handle works whatever the scope is that
  // Python loaded torch into.
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Getter>(symbol);
  }();
  void* stream = nullptr;
  if (getter == nullptr || getter(device_index, &stream) != 0)
    fail(op, "torch gave no CUDA stream for device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace sgld
