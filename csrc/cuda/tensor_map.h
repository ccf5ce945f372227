// Tensor maps for the copy engine of sm_90: what a kernel needs to fetch boxes of a tensor.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace sgld {

// A bf16 tensor [batch, token, head, element] in any order of memory with dense elements; strides in elements.
struct MapShape {
  int64_t batch = 0, tokens = 0, heads = 0, elements = 0;
  int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
};

// Boxes of `rows` tokens and 64 elements of one head, swizzled by 128 bytes; zeros outside of the tensor.
CUtensorMap map_of(const char* op, const char* name, const void* data, const MapShape& shape,
                   int rows);

}  // namespace sgld
