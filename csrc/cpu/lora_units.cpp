// Which kernels merge on this machine: those of the active ISA, or the matrix units, once they have shown that they
// get the same bits.
#include "lora_units.h"

#include <cstdlib>
#include <memory>
#include <vector>

#include "lora_block.h"
#include "lora_pack.h"
#include "sgld/isa.h"

namespace sgld {
namespace {

#if defined(SGLD_X86)

// The update of a block in fp32, from factors of any size down to where products become subnormal.
std::vector<float> sample_update(const LoraKernels& kernels) {
  constexpr int64_t rank = 75, cols = 128;
  uint32_t state = 1;
  const auto next = [&state] {
    state = state * 1664525u + 1013904223u;
    const uint32_t exponent = state >> 30 ? 120 + (state >> 20 & 7) : 60 + (state >> 20 & 7);
    return bf16{static_cast<uint16_t>((state >> 8 & 0x807f) | exponent << 7)};
  };
  std::vector<bf16> down(rank * cols), up(kLoraRows * rank);
  for (bf16& x : down) x = next();
  for (bf16& x : up) x = next();
  const LoraAdapter adapter{down.data(), up.data(), DType::bf16, DType::bf16, cols,
                            rank,        rank,      0,           kLoraRows,   0.7f};
  LoraFactor f = plan_factor(adapter, kernels, kLoraRows);
  std::vector<char> down_packed(down_bytes(f, cols)), up_packed(up_bytes(f));
  pack_down(adapter, f, cols, false, 0, cols / kLoraGroup, down_packed.data());
  pack_up(adapter, f, 0, kLoraRows, up_packed.data());
  f.down = down_packed.data();
  f.up = up_packed.data();
  std::vector<float> weights(kLoraRows * cols);
  LoraBlock block;
  block.factors = &f;
  block.factor_count = 1;
  block.rows = kLoraRows;
  block.cols = block.column_end = block.stride = cols;
  block.weight = weights.data();
  kernels.merge(block);
  return weights;
}

bool tiles_agree() {
  const std::vector<float> a = sample_update(lora_kernels_amx());
  const std::vector<float> b = sample_update(lora_kernels_avx512());
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

#endif

}  // namespace

LoraUnits lora_units() {
#if defined(SGLD_X86)
  const Isa isa = active_isa();
  if (isa == Isa::avx512_bf16) {
    static const bool vbmi2 =
        __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
    if (vbmi2 && active_amx()) {
      static const bool tiles = tiles_agree();
      if (tiles) return {"amx", lora_kernels_amx()};
    }
    if (vbmi2) return {"avx512_vbmi2", lora_kernels_avx512_vbmi2()};
  }
  if (isa >= Isa::avx512) return {"avx512", lora_kernels_avx512()};
  if (isa == Isa::avx2) return {"avx2", lora_kernels_avx2()};
#endif
  return {"scalar", lora_kernels_scalar()};
}

}  // namespace sgld
