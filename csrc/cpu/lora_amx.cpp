// The update with the matrix units of x86 CPUs, which multiply bf16 exactly and add in the fixed order.
#include "lora_block.h"
#include "lora_tiles.h"

namespace sgld {
namespace {

struct Amx {
  using Unit = TileUnit;
  using Vectors = LoraChains<Avx512<false>>;

  // A tile's rows: so the update stays in L1 beside the weights that are on their way.
  static int64_t rows_at_once(const LoraBlock& b) {
    for (int64_t i = 0; i < b.factor_count; ++i)
      if (b.factors[i].pairs) return kRowsOfTile;
    return kLoraRows;
  }

  // Tiles round as an update does, whatever the mode; the scales of several factors are the vectors' work.
  static bool in_any_mode(const LoraFactor& f, LoraTurn turn) {
    return f.pairs && turn == LoraTurn::only;
  }

  static void add(const LoraFactor& f, const LoraRows& r, int64_t group_begin, int64_t group_end,
                  LoraTurn turn, float* out) {
    if (!f.pairs) return Vectors::add(f, r, group_begin, group_end, turn, out);
    const int64_t stride = f.up_stride * static_cast<int64_t>(sizeof(bf16));
    const bf16* up = static_cast<const bf16*>(f.up) + packed_row(f, r) * f.up_stride;
    const __m512 scale = _mm512_set1_ps(f.scale);
    for (int64_t group = group_begin; group < group_end; ++group, out += kLoraGroup) {
      const bf16* down = static_cast<const bf16*>(f.down) + group * f.rank * kLoraGroup;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t k = 0; k < f.rank; k += kLoraChain) {
        _tile_loadd(2, up + k, stride);
        _tile_loadd(3, down + k * kRowsOfTile, kBytesOfRow);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(3, down + (f.rank + k) * kRowsOfTile, kBytesOfRow);
        _tile_dpbf16ps(1, 2, 3);
      }
      if (turn == LoraTurn::only) {
        constexpr int kStride = kLoraPanel * sizeof(float);
        _tile_stored(0, out, kStride);
        _tile_stored(1, out + kRowsOfTile, kStride);
        continue;
      }
      alignas(64) float sum[2][kRowsOfTile * kRowsOfTile];
      _tile_stored(0, sum[0], kBytesOfRow);
      _tile_stored(1, sum[1], kBytesOfRow);
      for (int64_t row = 0; row < r.count; ++row)
        for (int half = 0; half < 2; ++half) {
          const __m512 s = _mm512_load_ps(sum[half] + row * kRowsOfTile);
          float* at = out + row * kLoraPanel + half * kRowsOfTile;
          const __m512 d = turn == LoraTurn::first ? _mm512_mul_ps(scale, s)
                                                   : _mm512_fmadd_ps(scale, s, _mm512_load_ps(at));
          _mm512_store_ps(at, d);
        }
    }
  }
};

}  // namespace

LoraKernels lora_kernels_amx() { return LoraKernel<Avx512<false>, Amx>::kernels(true); }

}  // namespace sgld
