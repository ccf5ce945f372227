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

  // 16 rows by one group of columns, from its packed pairs: `out` in rows of `width`.
  static void one(const LoraFactor& f, const bf16* up, const bf16* down, float* out,
                  int64_t width) {
    const int64_t up_bytes = f.up_stride * sizeof(bf16), out_bytes = width * sizeof(float);
    const bf16* right = down + f.rank * kRowsOfTile;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < f.rank; k += kLoraChain) {
      _tile_loadd(4, up + k, up_bytes);
      _tile_loadd(5, down + k * kRowsOfTile, kBytesOfRow);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, right + k * kRowsOfTile, kBytesOfRow);
      _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + kRowsOfTile, out_bytes);
  }

  // By two groups: four sums at a time, as the next product of a sum has to wait for longer than two take.
  static void two(const LoraFactor& f, const bf16* up, const bf16* down, float* out,
                  int64_t width) {
    const int64_t up_bytes = f.up_stride * sizeof(bf16), out_bytes = width * sizeof(float);
    const int64_t half = f.rank * kRowsOfTile;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < f.rank; k += kLoraChain) {
      const bf16* at = down + k * kRowsOfTile;
      _tile_loadd(4, up + k, up_bytes);
      _tile_loadd(5, at, kBytesOfRow);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, at + half, kBytesOfRow);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, at + 2 * half, kBytesOfRow);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, at + 3 * half, kBytesOfRow);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + kRowsOfTile, out_bytes);
    _tile_stored(2, out + 2 * kRowsOfTile, out_bytes);
    _tile_stored(3, out + 3 * kRowsOfTile, out_bytes);
  }

  static void add(const LoraFactor& f, const LoraRows& r, int64_t group_begin, int64_t group_end,
                  LoraTurn turn, float* out) {
    if (!f.pairs) return Vectors::add(f, r, group_begin, group_end, turn, out);
    const bf16* up = static_cast<const bf16*>(f.up) + packed_row(f, r) * f.up_stride;
    for (int64_t group = group_begin; group < group_end;) {
      const bf16* down = static_cast<const bf16*>(f.down) + group * f.rank * kLoraGroup;
      const bool both = group + 1 < group_end;
      const auto multiply = both ? two : one;
      const int64_t width = both ? 2 * kLoraGroup : kLoraGroup;
      if (turn == LoraTurn::only) {
        multiply(f, up, down, out, kLoraPanel);
      } else {
        alignas(64) float sum[kRowsOfTile * 2 * kLoraGroup];
        multiply(f, up, down, sum, width);
        add_scaled(sum, width, r.count, f.scale, turn, out);
      }
      out += width;
      group += width / kLoraGroup;
    }
  }

  static void add_scaled(const float* sum, int64_t width, int64_t rows, float factor, LoraTurn turn,
                         float* out) {
    const __m512 scale = _mm512_set1_ps(factor);
    for (int64_t row = 0; row < rows; ++row, sum += width, out += kLoraPanel)
      for (int64_t c = 0; c < width; c += kRowsOfTile) {
        const __m512 s = _mm512_load_ps(sum + c);
        const __m512 d = turn == LoraTurn::first
                             ? _mm512_mul_ps(scale, s)
                             : _mm512_fmadd_ps(scale, s, _mm512_load_ps(out + c));
        _mm512_store_ps(out + c, d);
      }
  }
};

}  // namespace

LoraKernels lora_kernels_amx() { return LoraKernel<Avx512<false>, Amx>::kernels(true); }

}  // namespace sgld
