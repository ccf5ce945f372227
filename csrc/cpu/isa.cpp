#include "sgld/isa.h"

#include <atomic>
#include <stdexcept>

#if defined(SGLD_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Linux gives the tile registers to a process that asks; its threads have them from then on.
bool detect_amx() {
#if defined(SGLD_X86) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (machine_isa() < Isa::avx512_bf16 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

std::atomic<Isa> cap{Isa::amx_bf16};

}  // namespace

Isa machine_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  const Isa most = cap.load(std::memory_order_relaxed);
  return machine_isa() < most ? machine_isa() : most;
}

bool active_amx() {
  static const bool there = detect_amx();
  return there && cap.load(std::memory_order_relaxed) >= Isa::amx_bf16;
}

bool active_pairs() {
#if defined(SGLD_X86)
  if (active_isa() < Isa::avx512_bf16) return false;
  static const bool slow = __builtin_cpu_is("intel");
  return !slow || cap.load(std::memory_order_relaxed) == Isa::avx512_bf16;
#else
  return false;
#endif
}

void cap_isa(Isa level) { cap.store(level, std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx_bf16:
      return "amx_bf16";
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
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16})
    if (name == isa_name(isa)) return isa;
  throw std::invalid_argument("there is no CPU kernel level " + name);
}

}  // namespace sgld
