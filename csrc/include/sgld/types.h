// Element types and the view of a tensor that the pure code works on. No torch in here.
//
// What the ISA files use is `static inline` on purpose: with external linkage the linker could keep the copy that was
// compiled with AVX-512 flags and run it on a machine without AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SGLD_HOST_DEVICE __host__ __device__
#else
#define SGLD_HOST_DEVICE
#endif

namespace sgld {

enum class DType : int32_t { f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

SGLD_HOST_DEVICE static inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

constexpr int kMaxDims = 8;

// A borrowed tensor. `data == nullptr` with `ndim == 0` means that an optional tensor is absent.
struct View {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  bool present = false;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};
};

}  // namespace sgld
