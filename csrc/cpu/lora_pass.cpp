#include "lora_pass.h"

#include <algorithm>
#include <vector>

#include "sgld/lora_piece.h"

namespace sgld {
namespace {

float element(int64_t type, int64_t address, int64_t offset) {
  switch (static_cast<DType>(type)) {
    case DType::f32:
      return reinterpret_cast<const float*>(address)[offset];
    case DType::bf16:
      return widen(reinterpret_cast<const bf16*>(address)[offset]);
    case DType::f16:
      return widen(reinterpret_cast<const f16*>(address)[offset]);
  }
  return 0.0f;
}

float update_of(const LoraTables& p, const int64_t* matrix, int64_t row, int64_t column) {
  const int64_t block = row / kLoraRows;
  int reaching = 0;
  for (int64_t n = matrix[kLoraPartsFrom]; n < matrix[kLoraPartsTo]; ++n)
    reaching += lora_reaches(p.parts + n * kLoraPartColumns, block);
  float update = 0.0f;
  bool first = true;
  for (int64_t n = matrix[kLoraPartsFrom]; n < matrix[kLoraPartsTo]; ++n) {
    const int64_t* part = p.parts + n * kLoraPartColumns;
    if (!lora_reaches(part, block)) continue;
    const int64_t own = row - part[kLoraStart];
    const bool inside = own >= 0 && own < part[kLoraPartRows];
    float sum = 0.0f;
    for (int64_t begin = 0; begin < part[kLoraRank]; begin += kLoraChain) {
      float chain[2] = {0.0f, 0.0f};
      for (int64_t k = begin; k < begin + kLoraChain && k < part[kLoraRank]; ++k) {
        const float up =
            inside ? element(part[kLoraUpType], part[kLoraUp], own * part[kLoraUpStride] + k)
                   : 0.0f;
        const float down =
            element(part[kLoraDownType], part[kLoraDown], k * part[kLoraDownStride] + column);
        chain[k % 2] = lora_fused(up, down, chain[k % 2]);
      }
      sum = lora_sum(sum, lora_sum(chain[0], chain[1]));
    }
    update = lora_scaled(p.scales[n], sum, update, reaching == 1, first);
    first = false;
  }
  return update;
}

// One tile: rows from `row`, columns from `column`.
template <class T>
struct Tile {
  const LoraTables& p;
  const int64_t* matrix;
  int64_t index, row, column;

  Tile(const LoraTables& tables, int64_t at, int64_t local)
      : p(tables), matrix(tables.matrices + tables.owner[at] * kLoraMatrixColumns), index(at) {
    const int64_t panels = ceil_div(matrix[kLoraColumnCount], kLoraPanel);
    row = local / panels * kLoraRows;
    column = local % panels * kLoraPanel;
  }

  uint32_t* sums() const { return p.sums + p.owner[index] * kLoraSumColumns; }
  int64_t words() const {
    return ceil_div(matrix[kLoraColumnCount], kLoraGroup) * matrix[kLoraBitCount];
  }
  uint32_t* codes(int64_t r, int64_t c) const {
    return reinterpret_cast<uint32_t*>(matrix[kLoraCodes]) + r * words() +
           c / kLoraGroup * matrix[kLoraBitCount];
  }
  T* weight(int64_t r, int64_t c) const {
    return reinterpret_cast<T*>(matrix[kLoraWeight]) + r * matrix[kLoraStride] + c;
  }

  // f(row, first column, valid columns, update) of every 8 columns, row by row; the last pieces of a group may be
  // empty.
  template <class F>
  void pieces(bool updates, F f) const {
    const int64_t columns = matrix[kLoraColumnCount];
    const int64_t end = std::min(column + kLoraPanel, ceil_div(columns, kLoraGroup) * kLoraGroup);
    for (int64_t r = row; r < std::min(row + kLoraRows, matrix[kLoraRowCount]); ++r)
      for (int64_t c = column; c < end; c += kLoraPiece) {
        const int valid =
            static_cast<int>(std::max(int64_t{0}, std::min(int64_t{kLoraPiece}, columns - c)));
        float update[kLoraPiece] = {};
        for (int j = 0; updates && j < valid; ++j) update[j] = update_of(p, matrix, r, c + j);
        f(r, c, valid, update);
      }
  }
  LoraPiece<T> read(int64_t r, int64_t c, int valid) const {
    LoraPiece<T> x = {};
    std::copy_n(weight(r, c), valid, x.weight);
    return x;
  }
};

template <class T>
void sample(const LoraTables& p, int64_t index) {
  const Tile<T> tile(p, index, p.starts[index]);
  tile.pieces(true, [&](int64_t r, int64_t c, int valid, const float* update) {
    for (int bits = kLoraMinBits; bits <= kLoraMaxBits; ++bits) {
      const auto merged = lora_merge_piece(tile.read(r, c, valid), update, bits, c);
      tile.sums()[kLoraEscaped2 + bits - kLoraMinBits] += __builtin_popcount(merged.escaped);
    }
  });
}

template <class T>
void merge(const LoraTables& p, int64_t index, const Tile<T>& tile) {
  const int bits = static_cast<int>(tile.matrix[kLoraBitCount]);
  std::vector<LoraMergedPiece<T>> merged;
  std::vector<T> escapes;
  tile.pieces(true, [&](int64_t r, int64_t c, int valid, const float* update) {
    const LoraPiece<T> old = tile.read(r, c, valid);
    merged.push_back(lora_merge_piece(old, update, bits, c));
    for (int j = 0; j < kLoraPiece; ++j)
      if (merged.back().escaped >> j & 1u) escapes.push_back(old.weight[j]);
  });
  const auto total = static_cast<int64_t>(escapes.size());
  const int64_t slot = tile.sums()[kLoraTaken];
  tile.sums()[kLoraTaken] += static_cast<uint32_t>(total);
  p.counts[index] = static_cast<int32_t>(total);
  p.starts[index] = slot + total <= tile.matrix[kLoraRoom] ? slot : -1;
  if (p.starts[index] < 0) return;
  std::copy(escapes.begin(), escapes.end(), reinterpret_cast<T*>(tile.matrix[kLoraEscapes]) + slot);
  auto next = merged.begin();
  tile.pieces(false, [&](int64_t r, int64_t c, int valid, const float*) {
    std::copy_n(next->merged.weight, valid, tile.weight(r, c));
    tile.sums()[kLoraChecksum] += next->checksum;
    for (int b = 0; b < bits; ++b) {
      const uint32_t byte = next->planes >> (8 * b) & 0xffu, place = c % kLoraGroup / kLoraPiece;
      uint32_t& word = tile.codes(r, c)[b];
      word = (place == 0 ? 0 : word) | byte << (8 * place);
    }
    ++next;
  });
}

template <class T>
void unmerge(const LoraTables& p, int64_t index, const Tile<T>& tile) {
  if (p.starts[index] < 0) return;
  const int bits = static_cast<int>(tile.matrix[kLoraBitCount]);
  int64_t from = p.starts[index];
  tile.pieces(true, [&](int64_t r, int64_t c, int valid, const float* update) {
    uint32_t planes = 0;
    for (int b = 0; b < bits; ++b)
      planes |= (tile.codes(r, c)[b] >> (c % kLoraGroup) & 0xffu) << (8 * b);
    LoraPiece<T> old = lora_unmerge_piece(tile.read(r, c, valid), update, planes, bits);
    const uint32_t escaped = lora_piece_escaped(planes, bits);
    for (int j = 0; j < valid; ++j) {
      if (escaped >> j & 1u && from < tile.matrix[kLoraRoom])
        old.weight[j] = reinterpret_cast<const T*>(tile.matrix[kLoraEscapes])[from++];
      tile.sums()[kLoraChecksum] += lora_checksum<T>(lora_bits(old.weight[j]), c + j);
    }
    std::copy_n(old.weight, valid, tile.weight(r, c));
  });
}

template <class T>
void count(const LoraTables& p, int64_t index, const Tile<T>& tile) {
  const int bits = static_cast<int>(tile.matrix[kLoraBitCount]);
  p.counts[index] = 0;
  tile.pieces(false, [&](int64_t r, int64_t c, int, const float*) {
    uint32_t mask = 0xffu;
    for (int b = 0; b < bits; ++b) mask &= tile.codes(r, c)[b] >> (c % kLoraGroup);
    p.counts[index] += __builtin_popcount(mask);
  });
}

template <class T>
void run(const LoraTables& p) {
  for (int64_t index = 0; index < p.tiles; ++index) {
    if (p.mode == LoraMode::sample) {
      sample<T>(p, index);
      continue;
    }
    const int64_t* matrix = p.matrices + p.owner[index] * kLoraMatrixColumns;
    const Tile<T> tile(p, index, index - matrix[kLoraFirstTile]);
    if (p.mode == LoraMode::merge) merge(p, index, tile);
    if (p.mode == LoraMode::unmerge) unmerge(p, index, tile);
    if (p.mode == LoraMode::count) count(p, index, tile);
    if (p.mode == LoraMode::gather)
      std::copy_n(reinterpret_cast<const T*>(matrix[kLoraEscapes]) + p.starts[index],
                  p.counts[index], reinterpret_cast<T*>(matrix[kLoraGathered]) + p.places[index]);
  }
}

}  // namespace

LoraTables bind_lora_tables(int64_t mode, const Tensor& matrices, const Tensor& parts,
                            const Tensor& scales, const Tensor& owner, Tensor& starts,
                            Tensor& counts, const Tensor& places, Tensor& sums) {
  constexpr const char* op = kLoraMerge;
  const int64_t tiles = owner.numel();
  const auto check = [&](const char* name, const Tensor& tensor, ScalarType type, int64_t count,
                         int64_t columns) {
    const bool fits = tensor.is_contiguous() && tensor.scalar_type() == type &&
                      (count < 0 || tensor.numel() == count) && tensor.numel() % columns == 0 &&
                      tensor.is_cuda() == owner.is_cuda();
    if (!fits) fail(op, "the table ", name, " is not what a pass takes");
  };
  if (mode < 0 || mode > static_cast<int64_t>(LoraMode::gather)) fail(op, "mode ", mode);
  check("matrices", matrices, ScalarType::Long, -1, kLoraMatrixColumns);
  check("parts", parts, ScalarType::Long, -1, kLoraPartColumns);
  check("scales", scales, ScalarType::Float, parts.numel() / kLoraPartColumns, 1);
  check("owner", owner, ScalarType::Int, -1, 1);
  check("starts", starts, ScalarType::Long, tiles, 1);
  check("counts", counts, ScalarType::Int, tiles, 1);
  check("places", places, ScalarType::Long, tiles, 1);
  check("sums", sums, ScalarType::Int, matrices.numel() / kLoraMatrixColumns * kLoraSumColumns, 1);
  LoraTables p;
  p.mode = static_cast<LoraMode>(mode);
  p.matrices = static_cast<const int64_t*>(matrices.const_data_ptr());
  p.parts = static_cast<const int64_t*>(parts.const_data_ptr());
  p.scales = static_cast<const float*>(scales.const_data_ptr());
  p.owner = static_cast<const int32_t*>(owner.const_data_ptr());
  p.tiles = tiles;
  p.starts = static_cast<int64_t*>(starts.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  p.places = static_cast<const int64_t*>(places.const_data_ptr());
  p.sums = static_cast<uint32_t*>(sums.mutable_data_ptr());
  return p;
}

void lora_pass_cpu(int64_t mode, ScalarType dtype, const Tensor& matrices, const Tensor& parts,
                   const Tensor& scales, const Tensor& owner, Tensor starts, Tensor counts,
                   const Tensor& places, Tensor sums) {
  const LoraTables p =
      bind_lora_tables(mode, matrices, parts, scales, owner, starts, counts, places, sums);
  switch (dtype_of(kLoraMerge, "a weight", dtype)) {
    case DType::f32:
      return run<float>(p);
    case DType::bf16:
      return run<bf16>(p);
    case DType::f16:
      return run<f16>(p);
  }
}

}  // namespace sgld
