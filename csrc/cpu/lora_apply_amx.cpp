// Built for CPUs with tiles; nothing from the standard library whose copy other files could share.
#include "lora_apply_tiles.h"
#include "lora_tiles.h"

namespace sgld {
namespace {

constexpr int64_t kTile = kRowsOfTile;

// The compiler does not know what memory the tile instructions read and write.
inline void memory_in_order() { asm volatile("" ::: "memory"); }

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Words [kPairs][16], column j from pairs of neighbours in row `row` + j, of `count` rows.
template <int64_t kPairs>
void transpose(const LoraTileSource& m, int64_t row, int64_t count, int64_t first, uint32_t* out) {
  const bool full = 2 * (first + kPairs) <= m.columns;
  for (int64_t j = 0; j < count; ++j) {
    const bf16* from = m.data + (row + j) * m.columns;
    if (full) {
      uint32_t words[kPairs];
      std::memcpy(words, from + 2 * first, sizeof words);
      for (int64_t p = 0; p < kPairs; ++p) out[p * kTile + j] = words[p];
      continue;
    }
    for (int64_t p = 0; p < kPairs; ++p) {
      const int64_t k = 2 * (first + p);
      const uint32_t low = k < m.columns ? from[k].bits : 0u;
      const uint32_t high = k + 1 < m.columns ? from[k + 1].bits : 0u;
      out[p * kTile + j] = low | high << 16;
    }
  }
}

// Rows of x [32][padded width], with zeros where there are none.
void gather(const LoraTileRows& r, int64_t padded, bf16* to) {
  for (int64_t i = 0; i < kApplyRows; ++i, to += padded) {
    const int64_t filled = i < r.count ? r.width : 0;
    if (filled) std::memcpy(to, r.x + r.rows[i] * r.width, filled * sizeof(bf16));
    std::memset(to + filled, 0, (padded - filled) * sizeof(bf16));
  }
}

// Sums [32][16] of a rank tile, times the scale, as the left side of the second product: 16 numbers, 16 that they lost.
void split(const float* sum, float scale, bf16* to) {
  const __m512 s = _mm512_set1_ps(scale);
  for (int64_t row = 0; row < kApplyRows; ++row, to += kApplyPanel) {
    const __m512 value = _mm512_mul_ps(s, _mm512_load_ps(sum + row * kTile));
    const auto high = (__m256i)_mm512_cvtneps_pbh(value);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
    const __m512 rest = _mm512_sub_ps(value, _mm512_castsi512_ps(wide));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), high);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + kTile), (__m256i)_mm512_cvtneps_pbh(rest));
  }
}

// x down^T of a factor into `hidden` [rank tile][32][32].
void shrink(const LoraTileFactor& f, const bf16* x, int64_t stride, int64_t steps, bf16* hidden) {
  alignas(64) float sums[2][kApplyRows * kTile];
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(bf16));
  for (int64_t t = 0; t < f.rank_tiles; t += 2) {
    const bool both = t + 1 < f.rank_tiles;
    const uint32_t* down = f.down + t * steps * kTileWords;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < steps; ++k, down += kTileWords) {
      const bf16* at = x + k * kApplyPanel;
      if (t == 0)
        for (int64_t row = 0; row < kApplyRows; ++row)
          _mm_prefetch(reinterpret_cast<const char*>(at + row * stride + 8 * kApplyPanel),
                       _MM_HINT_T0);
      _tile_loadd(4, at, bytes);
      _tile_loadd(5, at + kTile * stride, bytes);
      _tile_loadd(6, down, kBytesOfRow);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (both) {
        _tile_loadd(7, down + steps * kTileWords, kBytesOfRow);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums[0], kBytesOfRow);
    _tile_stored(1, sums[0] + kTile * kTile, kBytesOfRow);
    _tile_stored(2, sums[1], kBytesOfRow);
    _tile_stored(3, sums[1] + kTile * kTile, kBytesOfRow);
    memory_in_order();
    split(sums[0], f.scale, hidden + t * kApplyRows * kApplyPanel);
    if (both) split(sums[1], f.scale, hidden + (t + 1) * kApplyRows * kApplyPanel);
    memory_in_order();
  }
}

// y of a panel plus its update [32][32].
void add(const LoraTileRows& r, int64_t panel, const float* update) {
  const int64_t column = panel * kApplyPanel, left = smaller(kApplyPanel, r.out - column);
  const auto present = static_cast<__mmask32>((uint64_t{1} << left) - 1);
  for (int64_t row = 0; row < r.count; ++row, update += kApplyPanel) {
    bf16* y = r.y + r.rows[row] * r.out + column;
    _mm_prefetch(reinterpret_cast<const char*>(y + 4 * kApplyPanel), _MM_HINT_T0);
    const __m512i old = _mm512_maskz_loadu_epi16(present, y);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(old));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(old, 1));
    const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(low, 16));
    const __m512 b = _mm512_castsi512_ps(_mm512_slli_epi32(high, 16));
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_add_ps(b, _mm512_load_ps(update + kTile)),
                                              _mm512_add_ps(a, _mm512_load_ps(update)));
    _mm512_mask_storeu_epi16(y, present, (__m512i)both);
  }
}

void expand(const LoraTileRows& r, const bf16* hidden) {
  alignas(64) float update[kApplyRows * kApplyPanel];
  constexpr int64_t kHidden = kApplyRows * kApplyPanel;
  constexpr int kStride = kApplyPanel * sizeof(float);
  for (int64_t panel = 0; panel < ceil_div(r.out, kApplyPanel); ++panel) {
    bool reached = false;
    const bf16* left = hidden;
    for (int64_t n = 0; n < r.factor_count; left += r.factors[n++].rank_tiles * kHidden) {
      const LoraTileFactor& f = r.factors[n];
      if (panel < f.panel_begin || panel >= f.panel_end) continue;
      if (!reached) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        reached = true;
      }
      const uint32_t* up = f.up + (panel - f.panel_begin) * f.rank_tiles * 2 * kTileWords;
      for (int64_t t = 0; t < f.rank_tiles; ++t, up += 2 * kTileWords) {
        _tile_loadd(4, left + t * kHidden, kBytesOfRow);
        _tile_loadd(5, left + t * kHidden + kTile * kApplyPanel, kBytesOfRow);
        _tile_loadd(6, up, kBytesOfRow);
        _tile_loadd(7, up + kTileWords, kBytesOfRow);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    if (!reached) continue;
    _tile_stored(0, update, kStride);
    _tile_stored(1, update + kTile, kStride);
    _tile_stored(2, update + kTile * kApplyPanel, kStride);
    _tile_stored(3, update + kTile * kApplyPanel + kTile, kStride);
    memory_in_order();
    add(r, panel, update);
    memory_in_order();
  }
}

}  // namespace

void lora_pack_down_tiles(const LoraTileSource& down, uint32_t* out) {
  const int64_t words = lora_down_words(down.rows, down.columns);
  std::memset(out, 0, words * sizeof(uint32_t));
  for (int64_t rank = 0; rank < down.rows; rank += kTile)
    for (int64_t k = 0; k < down.columns; k += kApplyPanel, out += kTileWords)
      transpose<kTile>(down, rank, smaller(kTile, down.rows - rank), k / 2, out);
}

void lora_pack_up_tiles(const LoraTileSource& up, const LoraTileFactor& f, int64_t start,
                        uint32_t* out) {
  std::memset(out, 0, lora_up_words(f) * sizeof(uint32_t));
  for (int64_t panel = f.panel_begin; panel < f.panel_end; ++panel)
    for (int64_t t = 0; t < f.rank_tiles; ++t)
      for (int64_t half = 0; half < 2; ++half, out += kTileWords) {
        const int64_t column = panel * kApplyPanel + half * kTile - start;
        const int64_t first = column > 0 ? column : 0;
        const int64_t last = smaller(column + kTile, up.rows);
        if (first >= last) continue;
        uint32_t* to = out + (first - column);
        transpose<kTile / 2>(up, first, last - first, t * kTile / 2, to);
        const int64_t words = kTileWords / 2 - (first - column);
        std::memcpy(to + kTileWords / 2, to, words * sizeof(uint32_t));
      }
}

void lora_apply_tiles(const LoraTileRows& r, bf16* scratch) {
  const int64_t steps = ceil_div(r.width, kApplyPanel), padded = steps * kApplyPanel;
  const bf16* x = r.x + r.rows[0] * r.width;
  int64_t stride = r.width;
  bf16* hidden = scratch + kApplyRows * padded;
  const bool together = r.rows[r.count - 1] - r.rows[0] == r.count - 1;
  if (!together || r.count < kApplyRows || padded != r.width) {
    gather(r, padded, scratch);
    x = scratch;
    stride = padded;
  }
  const TileUnit unit;
  memory_in_order();
  bf16* to = hidden;
  for (int64_t n = 0; n < r.factor_count; ++n) {
    shrink(r.factors[n], x, stride, steps, to);
    to += r.factors[n].rank_tiles * kApplyRows * kApplyPanel;
  }
  expand(r, hidden);
}

}  // namespace sgld
