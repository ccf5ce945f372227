// The pure parts of the LoRA merge: every kernel of this machine against double arithmetic and, bit for bit, against
// the scalar one; the codes; the choice of their size. Run by ctest; needs no torch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "lora_block.h"
#include "lora_codes.h"
#include "lora_pack.h"
#include "lora_units.h"
#include "sgld/isa.h"
#include "sgld/lora_pass.h"
#include "sgld/lora_piece.h"

namespace {

using namespace sgld;

struct Case {
  static constexpr int64_t rows = 37, cols = 205, rank = 41;
  std::vector<bf16> base, down, up;
  std::vector<double> want;

  Case() : base(rows * cols), down(rank * cols), up(rows * rank), want(rows * cols) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (bf16& x : base) narrow(0.02f * normal(random), &x);
    for (bf16& x : down) narrow(normal(random), &x);
    for (bf16& x : up) narrow(1e-3f * normal(random), &x);
    base[3].bits = 0x8000;  // -0
    base[4].bits = 0x7fc1;  // NaN
    base[5].bits = 0xff80;  // -infinity
    base[6].bits = 0x0001;  // the smallest subnormal
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < rank; ++k)
          sum += double{widen(up[i * rank + k])} * widen(down[k * cols + j]);
        want[i * cols + j] = widen(base[i * cols + j]) + 0.5 * sum;
      }
  }
};

struct Result {
  std::vector<bf16> weight;
  std::vector<uint32_t> codes;
  std::vector<bf16> escapes;
  uint32_t checksum = 0;
};

// Merges, checks that unmerging restores the bytes, and returns the merged weight with its record.
Result cycle(const char* name, const Case& c, const LoraKernels& kernels, int bits) {
  const LoraAdapter adapter{c.down.data(), c.up.data(), DType::bf16, DType::bf16, Case::cols,
                            Case::rank,    Case::rank,  0,           Case::rows,  0.5f};
  LoraFactor f = plan_factor(adapter, kernels, Case::rows);
  const int64_t groups = ceil_div(Case::cols, kLoraGroup);
  std::vector<char> memory(down_bytes(f, Case::cols) + up_bytes(f) + 128);
  char* down = memory.data() + 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
  char* up = down + down_bytes(f, Case::cols);
  pack_down(adapter, f, Case::cols, kernels.split_bf16, 0, groups, down);
  pack_up(adapter, f, 0, kLoraRows, up);
  f.down = down;
  f.up = up;
  Result r{c.base, std::vector<uint32_t>(Case::rows * groups * bits),
           std::vector<bf16>(Case::rows * Case::cols + kLoraGroup)};
  LoraBlock b;
  b.factors = &f;
  b.factor_count = 1;
  b.dtype = DType::bf16;
  b.rows = Case::rows;
  b.cols = b.column_end = b.stride = Case::cols;
  b.weight = r.weight.data();
  b.bits = bits;
  b.codes = r.codes.data();
  b.code_stride = groups * bits;
  b.escapes = r.escapes.data();
  const LoraPassed merged = kernels.merge(b);
  r.checksum = merged.checksum;
  r.escapes.resize(merged.escapes);

  std::vector<bf16> restored = r.weight;
  b.weight = restored.data();
  b.escapes = r.escapes.data();
  const LoraPassed unmerged = kernels.unmerge(b);
  const std::string what = std::string(name) + " with " + std::to_string(bits) + " bits ";
  expect(std::memcmp(restored.data(), c.base.data(), restored.size() * 2) == 0,
         what + "restores the bytes");
  expect(unmerged.escapes == merged.escapes && unmerged.checksum == merged.checksum,
         what + "finds the same escapes and checksum");
  double worst = 0;
  for (size_t i = 0; i < r.weight.size(); ++i)
    if (std::isfinite(c.want[i]))
      worst =
          std::max(worst, std::abs(widen(r.weight[i]) - c.want[i]) / (1e-3 + std::abs(c.want[i])));
  expect(worst < 1.0 / 256, what + "differs by " + std::to_string(worst));
  return r;
}

bool same(const Result& a, const Result& b) {
  return std::memcmp(a.weight.data(), b.weight.data(), a.weight.size() * 2) == 0 &&
         a.codes == b.codes && a.checksum == b.checksum && a.escapes.size() == b.escapes.size() &&
         std::memcmp(a.escapes.data(), b.escapes.data(), a.escapes.size() * 2) == 0;
}

void kernels_agree() {
  const Case c;
  for (int bits = kLoraMinBits; bits <= kLoraMaxBits; ++bits) {
    const Result scalar = cycle("scalar", c, lora_kernels_scalar(), bits);
    expect(scalar.escapes.size() >= 2, "what is not finite escapes");
#if defined(SGLD_X86)
    if (machine_isa() >= Isa::avx2)
      expect(same(cycle("avx2", c, lora_kernels_avx2(), bits), scalar), "avx2 is as scalar");
    if (machine_isa() >= Isa::avx512)
      expect(same(cycle("avx512", c, lora_kernels_avx512(), bits), scalar), "avx512 is as scalar");
    if (machine_isa() >= Isa::avx512_bf16 && __builtin_cpu_supports("avx512vbmi2"))
      expect(same(cycle("avx512_vbmi2", c, lora_kernels_avx512_vbmi2(), bits), scalar),
             "avx512_vbmi2 is as scalar");
    const LoraUnits best = lora_units();
    expect(same(cycle(best.name, c, best.kernels, bits), scalar), "the best units are as scalar");
#endif
  }
}

void codes_survive_packing() {
  uint8_t code[kLoraGroup], back[kLoraGroup];
  for (int bits = kLoraMinBits; bits <= kLoraMaxBits; ++bits) {
    for (int j = 0; j < kLoraGroup; ++j)
      code[j] = static_cast<uint8_t>((j * 7 + bits) % (1 << bits));
    uint32_t words[kLoraMaxBits], escaped = 0;
    lora_pack(code, bits, words);
    lora_unpack(words, bits, back);
    expect(std::equal(code, code + kLoraGroup, back), "codes survive packing");
    for (int j = 0; j < kLoraGroup; ++j) escaped |= uint32_t{code[j] == (1 << bits) - 1} << j;
    expect(lora_escaped(words, bits) == escaped, "the largest code is the escape");
  }
}

void the_cheapest_code_wins() {
  const auto choose = [](int64_t two, int64_t three, int64_t four, DType dtype) {
    return choose_bits({1000, {0, 0, two, three, four}}, dtype);
  };
  expect(choose(10, 5, 1, DType::bf16) == 2, "few escapes: 2 bits");
  expect(choose(100, 10, 5, DType::bf16) == 3, "10 % escapes of 2 bits: 3 bits");
  expect(choose(400, 200, 20, DType::bf16) == 4, "many: 4 bits");
  expect(choose(900, 800, 700, DType::bf16) == 0, "nothing fits: a copy");
  expect(choose(100, 10, 5, DType::f32) == 3, "fp32: 3 bits");
}

// What a thread of a GPU does with 8 weights, for every exponent and with what has none, and back.
template <class T>
void pieces_survive(const char* name) {
  std::mt19937 random(5);
  for (int round = 0; round < 20000; ++round) {
    LoraPiece<T> old;
    float update[kLoraPiece];
    for (int j = 0; j < kLoraPiece; ++j) {
      const auto bits = static_cast<LoraBits<T>>(random());
      std::memcpy(&old.weight[j], &bits, sizeof bits);
      // Mostly near the weight's own size, so that codes of every kind appear.
      const float near = widen(old.weight[j]) * 0.3f * static_cast<float>(random() % 200) / 100.0f;
      update[j] = round % 3 == 0 || !std::isfinite(near) ? 1e-3f : near;
    }
    const int bits = kLoraMinBits + round % 3;
    const auto column = static_cast<uint32_t>(round % 4 * kLoraPiece);
    const auto r = lora_merge_piece(old, update, bits, column);
    expect(lora_piece_escaped(r.planes, bits) == r.escaped, "planes say what escaped");
    LoraPiece<T> back = lora_unmerge_piece(r.merged, update, r.planes, bits);
    uint32_t checksum = 0;
    for (int j = 0; j < kLoraPiece; ++j) {
      if (r.escaped >> j & 1u) back.weight[j] = old.weight[j];
      checksum += lora_checksum<T>(lora_bits(back.weight[j]), column + j);
      const bool finite = (lora_bits(old.weight[j]) & lora_exponent<T>()) != lora_exponent<T>();
      expect(finite || (r.escaped >> j & 1u), "what is not finite escapes");
    }
    expect(std::memcmp(&back, &old, sizeof old) == 0, std::string(name) + " piece comes back");
    expect(checksum == r.checksum, "the checksum is of the weights before");
    const auto none = lora_merge_piece(old, update, 0, column);
    expect(none.planes == 0 && none.escaped == 0, "no codes");
    if (failures > 0) return;
  }
}

void arithmetic_flushes_what_is_subnormal() {
  const float tiny = bits_to_float(1), small = 0x1p-100f;
  expect(lora_fused(tiny, 1e30f, 0.0f) == 0.0f, "operands");
  expect(lora_fused(small, small, 0.0f) == 0.0f, "results");
  expect(lora_sum(0x1.8p-126f, -0x1p-126f) == 0.0f, "sums");
  expect(lora_scaled(small, small, 7.0f, false, true) == 0.0f, "the first adapter");
  expect(lora_scaled(0x1p-70f, 0x1p-70f, 0.0f, true, true) == 0x1p-140f,
         "an only adapter does not");
  expect(lora_fused(0x1.000002p0f, 0x1.000002p0f, -0x1.000004p0f) == 0x1p-46f, "one rounding");
}

void the_gpu_tile_reads_without_conflicts() {
  bool seen[kLoraPanel] = {};
  for (int c = 0; c < kLoraPanel; ++c) seen[lora_down_at(c)] = true;
  for (const bool one : seen) expect(one, "a permutation of the columns");
  // 16 bytes of 8 threads at a time must meet all 32 banks.
  for (int half = 0; half < 2; ++half)
    for (int first = 0; first < 16; first += 8) {
      int banks[32] = {};
      for (int thread = first; thread < first + 8; ++thread)
        for (int b = 0; b < 4; ++b) ++banks[lora_down_at(thread * 8 + half * 4 + b) % 32];
      for (const int count : banks) expect(count == 1, "banks");
    }
  int64_t part[kLoraPartColumns] = {};
  part[kLoraStart] = 47;
  part[kLoraPartRows] = 50;
  expect(lora_reaches(part, 0) && lora_reaches(part, 1) && lora_reaches(part, 2), "three blocks");
  expect(!lora_reaches(part, 3), "97 rows end in the third");
  expect(lora_grid(5, 132) == 5 && lora_grid(1 << 20, 132) == 264, "grid");
}

}  // namespace

int main() {
  pieces_survive<float>("fp32");
  pieces_survive<bf16>("bf16");
  pieces_survive<f16>("fp16");
  arithmetic_flushes_what_is_subnormal();
  the_gpu_tile_reads_without_conflicts();
  kernels_agree();
  codes_survive_packing();
  the_cheapest_code_wins();
  if (failures == 0) std::printf("selftest_lora: all passed (%s)\n", lora_units().name);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
