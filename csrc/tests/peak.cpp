// What one core multiplies and adds at most, by instruction, in GFLOP/s: the limit of the compute-bound kernels. Prints
// one JSON line; benchmarks divide by it. 0 where the machine lacks the instruction. Needs no torch.
#include <chrono>
#include <cstdio>

#include "sgld/isa.h"

#if defined(SGLD_X86)
#include <immintrin.h>
#endif

namespace {

constexpr int kRepeats = 5;

template <class Loop>
double rate(const Loop& loop) {
  double best = 0;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const double work = loop();
    const std::chrono::duration<double> span = std::chrono::steady_clock::now() - start;
    if (work / span.count() > best) best = work / span.count();
  }
  return best * 1e-9;
}

#if defined(SGLD_X86)

constexpr int kChains = 24;
constexpr int kSteps = 500000;

__attribute__((target("avx512f"))) double multiply_adds() {
  __m512 sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512 x = _mm512_set1_ps(0.5f);
  for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_fmadd_ps(sum[i], x, x);
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  volatile float keep = _mm512_reduce_add_ps(sum[0]);
  (void)keep;
  return 2.0 * 16 * kChains * kSteps;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) double pair_products() {
  __m512 sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f00);
  for (int step = 0; step < kSteps; ++step)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], x, x);
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  volatile float keep = _mm512_reduce_add_ps(sum[0]);
  (void)keep;
  return 4.0 * 16 * kChains * kSteps;
}

__attribute__((target("amx-tile,amx-bf16"))) double tile_products() {
  struct {
    unsigned char palette = 1, start_row = 0, reserved[14] = {};
    unsigned short row_bytes[16] = {};
    unsigned char rows[16] = {};
  } shape;
  for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
  asm volatile("ldtilecfg %0" : : "m"(shape));
  for (int step = 0; step < kSteps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 2 * 16 * 16 * 32 * kSteps;
}

#endif

}  // namespace

int main() {
  double fma = 0, pairs = 0, tiles = 0;
#if defined(SGLD_X86)
  if (sgld::machine_isa() >= sgld::Isa::avx512) fma = rate(multiply_adds);
  if (sgld::machine_isa() >= sgld::Isa::avx512_bf16) pairs = rate(pair_products);
  if (sgld::active_amx()) tiles = rate(tile_products);
#endif
  std::printf("{\"fma\": %.1f, \"vdpbf16\": %.1f, \"tdpbf16\": %.1f}\n", fma, pairs, tiles);
}
