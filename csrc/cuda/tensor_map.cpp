#include "tensor_map.h"

#include <cuda_runtime.h>

#include "sgld/check.h"

namespace sgld {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver that the runtime has loaded: this library itself is not linked against it.
Encode encoder(const char* op) {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<Encode>(usable ? function : nullptr);
  }();
  if (encode == nullptr) fail(op, "the driver has no cuTensorMapEncodeTiled; it needs CUDA 12");
  return encode;
}

}  // namespace

CUtensorMap map_of(const char* op, const char* name, const void* data, const MapShape& s,
                   int rows) {
  constexpr uint32_t kColumn = 64;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(s.elements),
                               static_cast<cuuint64_t>(s.tokens), static_cast<cuuint64_t>(s.heads),
                               static_cast<cuuint64_t>(s.batch)};
  // The stride of a dimension of size 1 is never used, but it must be a valid one.
  const auto bytes = [](int64_t stride, int64_t size) {
    return static_cast<cuuint64_t>(size == 1 ? 16 : stride * 2);
  };
  const cuuint64_t strides[3] = {bytes(s.token_stride, s.tokens), bytes(s.head_stride, s.heads),
                                 bytes(s.batch_stride, s.batch)};
  const cuuint32_t box[4] = {kColumn, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t every[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder(op)(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), sizes,
                  strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    fail(op, "the driver makes no tensor map of ", name, ": error ", static_cast<int>(result));
  return map;
}

}  // namespace sgld
