// What a LoRA merge does to one weight, the same bits on every processor: the arithmetic of the update, the code of what
// rounding lost, the term of the checksum. lora.h describes the whole.
#pragma once

#include <cmath>
#include <type_traits>

#include "sgld/lora.h"
#include "sgld/vec.h"

namespace sgld {

template <class T>
using LoraBits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

template <class T>
SGLD_HOST_DEVICE static constexpr LoraBits<T> lora_exponent() {
  if constexpr (std::is_same_v<T, float>)
    return 0x7f800000u;
  else
    return std::is_same_v<T, bf16> ? 0x7f80u : 0x7c00u;
}

// The code of a weight from its bits and the recomputed ones; the largest one is the escape.
template <class T>
SGLD_HOST_DEVICE static inline uint8_t lora_code(LoraBits<T> old, LoraBits<T> back, int bits) {
  using U = LoraBits<T>;
  const U escape = static_cast<U>((1 << bits) - 1);
  const U k = static_cast<U>(old - back + escape / 2);
  const bool fits = k < escape && (old & lora_exponent<T>()) != lora_exponent<T>();
  return static_cast<uint8_t>(fits ? k : escape);
}

// The weight of a code that is not the escape.
template <class T>
SGLD_HOST_DEVICE static inline LoraBits<T> lora_decoded(LoraBits<T> back, uint32_t code, int bits) {
  return static_cast<LoraBits<T>>(back + code - ((1u << bits) - 1) / 2);
}

template <class T>
SGLD_HOST_DEVICE static inline uint32_t lora_checksum(LoraBits<T> bits, uint32_t column) {
  using Signed = std::make_signed_t<LoraBits<T>>;
  return static_cast<uint32_t>(int32_t{static_cast<Signed>(bits)}) *
         (2 * (column % kLoraGroup) + 1);
}

// The bits near those of the weight that was merged. Of a bf16 the lower half is cut off rather than rounded.
template <class T>
SGLD_HOST_DEVICE static inline LoraBits<T> lora_recomputed(T merged, float update) {
  const float wide = widen(merged) - update;
  if constexpr (std::is_same_v<T, bf16>) {
    return static_cast<uint16_t>(float_to_bits(wide) >> 16);
  } else {
    T narrowed;
    narrow(wide, &narrowed);
    LoraBits<T> bits;
    memcpy(&bits, &narrowed, sizeof bits);
    return bits;
  }
}

// ---- arithmetic of the update: to nearest, subnormal operands and results as zero ----

SGLD_HOST_DEVICE static inline float lora_flushed(float x) {
  const uint32_t bits = float_to_bits(x);
  return (bits & 0x7f800000u) == 0 ? bits_to_float(bits & 0x80000000u) : x;
}

SGLD_HOST_DEVICE static inline float lora_fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  float d;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
#else
  return lora_flushed(std::fma(lora_flushed(a), lora_flushed(b), lora_flushed(c)));
#endif
}

SGLD_HOST_DEVICE static inline float lora_sum(float a, float b) {
#if defined(__CUDA_ARCH__)
  float c;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return lora_flushed(lora_flushed(a) + lora_flushed(b));
#endif
}

// The part of one adapter, `sum` as lora.h has it, on the update so far. Of the only adapter it is a plain product.
SGLD_HOST_DEVICE static inline float lora_scaled(float scale, float sum, float update, bool only,
                                                 bool first) {
#if defined(__CUDA_ARCH__)
  if (only) return __fmul_rn(scale, sum);
  float product;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(scale), "f"(sum));
#else
  if (only) return scale * sum;
  const float product = lora_flushed(lora_flushed(scale) * lora_flushed(sum));
#endif
  return first ? product : lora_fused(scale, sum, update);
}

}  // namespace sgld
