// Host side of every CUDA op: the device guard, torch's current stream, and launch errors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "sgld/check.h"

namespace sgld {

// torch's current stream on a device. libtorch_cuda is looked up at run time, so that this library also loads beside a
// torch without CUDA.
cudaStream_t current_stream(const char* op, int32_t device_index);

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) fail(op, "launch failed: ", cudaGetErrorString(error));
}

}  // namespace sgld
