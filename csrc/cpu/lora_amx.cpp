// The update with the matrix units of x86 CPUs, which multiply bf16 exactly and add in the fixed order.
#include "lora_block.h"
#include "lora_tiles.h"

namespace sgld {
namespace {

constexpr int kTiles = kLoraRows / kRowsOfTile;
static_assert(kTiles == 3, "add() names its tiles");

struct Amx {
  using Unit = TileUnit;

  static void add(const LoraFactor& f, const LoraBlock& b, int64_t group_begin, int64_t group_end,
                  LoraTurn turn, float* out) {
    if (!f.pairs) return LoraChains<Avx512<false>>::add(f, b, group_begin, group_end, turn, out);
    const int64_t stride = f.rank * static_cast<int64_t>(sizeof(bf16));
    const bf16* up =
        static_cast<const bf16*>(f.up) + (b.index - f.block_begin) * kLoraRows * f.rank;
    const __m512 scale = _mm512_set1_ps(f.scale);
    for (int64_t half = 2 * group_begin; half < 2 * group_end; ++half) {
      const bf16* down = static_cast<const bf16*>(f.down) + half * f.rank * kRowsOfTile;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      for (int64_t k = 0; k < f.rank; k += kLoraChain) {
        _tile_loadd(3, up + k, stride);
        _tile_loadd(4, up + kRowsOfTile * f.rank + k, stride);
        _tile_loadd(5, up + 2 * kRowsOfTile * f.rank + k, stride);
        _tile_loadd(6, down + k * kRowsOfTile, kBytesOfRow);
        _tile_dpbf16ps(0, 3, 6);
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
      }
      float* to = out + (half - 2 * group_begin) * kRowsOfTile;
      if (turn == LoraTurn::only) {
        constexpr int kStride = kLoraPanel * sizeof(float);
        _tile_stored(0, to, kStride);
        _tile_stored(1, to + kRowsOfTile * kLoraPanel, kStride);
        _tile_stored(2, to + 2 * kRowsOfTile * kLoraPanel, kStride);
        continue;
      }
      alignas(64) float sum[kLoraRows * kRowsOfTile];
      _tile_stored(0, sum, kBytesOfRow);
      _tile_stored(1, sum + 256, kBytesOfRow);
      _tile_stored(2, sum + 512, kBytesOfRow);
      for (int64_t row = 0; row < b.rows; ++row) {
        const __m512 s = _mm512_load_ps(sum + row * kRowsOfTile);
        float* at = to + row * kLoraPanel;
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
