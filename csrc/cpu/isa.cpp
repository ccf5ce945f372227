#include "sgld/isa.h"

#include <atomic>
#include <stdexcept>

namespace sgld {
namespace {

Isa detect() {
#if defined(SGLD_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  // Every CPU with AVX2 and FMA that was ever made has F16C, too.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::scalar;
}

std::atomic<Isa> cap{Isa::avx512_bf16};

}  // namespace

Isa machine_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  const Isa most = cap.load(std::memory_order_relaxed);
  return machine_isa() < most ? machine_isa() : most;
}

void cap_isa(Isa level) { cap.store(level, std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::scalar:
      break;
  }
  return "scalar";
}

Isa isa_from_name(const std::string& name) {
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16})
    if (name == isa_name(isa)) return isa;
  throw std::invalid_argument("there is no CPU kernel level " + name);
}

}  // namespace sgld
