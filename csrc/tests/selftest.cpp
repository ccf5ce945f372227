// The pure parts against plain double arithmetic: rounding of the vector types, the boundary checks, and the rows of
// norm_modulate on every ISA this machine has. Run by ctest; needs no torch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "expect.h"
#include "norm_modulate_rows.h"
#include "sgld/check.h"
#include "sgld/isa.h"
#include "sgld/norm_modulate.h"
#include "sgld/vec.h"

namespace {

using namespace sgld;

void narrowing_rounds_to_nearest_even() {
  const auto to_bf16 = [](float x) {
    bf16 out;
    narrow(x, &out);
    return out.bits;
  };
  const auto to_f16 = [](float x) {
    f16 out;
    narrow(x, &out);
    return out.bits;
  };
  expect(to_bf16(1.0f) == 0x3f80, "bf16 of 1");
  expect(to_bf16(bits_to_float(0x3f808000)) == 0x3f80, "bf16 tie goes to even, down");
  expect(to_bf16(bits_to_float(0x3f818000)) == 0x3f82, "bf16 tie goes to even, up");
  expect(to_bf16(std::numeric_limits<float>::infinity()) == 0x7f80, "bf16 of infinity");
  expect((to_bf16(std::nanf("")) & 0x7fff) > 0x7f80, "bf16 of NaN");
  expect(to_bf16(bits_to_float(0x7f800001)) == 0x7fc0, "bf16 of a NaN with low bits stays NaN");
  expect(to_f16(65504.0f) == 0x7bff && to_f16(65520.0f) == 0x7c00, "largest halves");
  expect(to_f16(0x1p-24f) == 1 && to_f16(0x1p-25f) == 0, "smallest halves");
  expect(to_f16(-2.0f) == 0xc000, "half of -2");
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const f16 half{static_cast<uint16_t>(bits)};
    const bf16 brain{static_cast<uint16_t>(bits)};
    if (std::isnan(widen(half)) || std::isnan(widen(brain))) continue;
    if (to_f16(widen(half)) != bits || to_bf16(widen(brain)) != bits) {
      expect(false, "16-bit value " + std::to_string(bits) + " survives a round trip");
      break;
    }
  }
}

View view(const void* data, DType dtype, std::vector<int64_t> sizes) {
  View v;
  v.data = data;
  v.dtype = dtype;
  v.present = true;
  v.ndim = static_cast<int>(sizes.size());
  int64_t stride = 1;
  for (int i = v.ndim - 1; i >= 0; --i) {
    v.sizes[i] = sizes[i];
    v.strides[i] = stride;
    stride *= sizes[i];
  }
  return v;
}

void checks_name_the_size() {
  const float x[24] = {};
  const auto bind = [&](std::vector<int64_t> x_sizes, std::vector<int64_t> scale_sizes) {
    return error_of([&] {
      bind_norm_modulate(view(x, DType::f32, x_sizes), view(x, DType::f32, scale_sizes), {}, {}, {},
                         1e-6, false);
    });
  };
  expect(bind({2, 3, 4}, {2, 4}).empty(), "[B, D] fits");
  expect(bind({2, 3, 4}, {2, 1, 4}).empty(), "[B, 1, D] fits");
  expect(bind({2, 3, 4}, {1, 3, 4}).empty(), "[1, S, D] fits");
  expect(bind({2, 3, 4}, {2, 5}).find("D is 4") != std::string::npos, "wrong D is named");
  expect(bind({2, 3, 4}, {3, 4}).find("B is 2") != std::string::npos, "wrong B is named");
  expect(bind({2, 3, 4}, {2, 2, 4}).find("S is 3") != std::string::npos, "wrong S is named");
}

double reference(const std::vector<float>& x, int64_t i, double eps, bool rms) {
  double mean = 0, square = 0;
  if (!rms)
    for (const float v : x) mean += v / static_cast<double>(x.size());
  for (const float v : x) square += (v - mean) * (v - mean) / static_cast<double>(x.size());
  return (x[i] - mean) / std::sqrt(square + eps);
}

void rows_equal_the_reference(const char* name, NormModulateRows rows, int64_t D, bool rms,
                              bool per_token) {
  const int64_t B = 2, S = 7;
  std::mt19937 random(7);
  std::normal_distribution<float> normal(3.0f, 2.0f);
  std::vector<float> x(B * S * D), scale(B * D), shift(B * (per_token ? S : 1) * D), weight(D),
      bias(D), out(x.size());
  for (auto* values : {&x, &scale, &shift, &weight, &bias})
    for (float& value : *values) value = normal(random);
  NormModulate p = bind_norm_modulate(
      view(x.data(), DType::f32, {B, S, D}), view(scale.data(), DType::f32, {B, D}),
      view(shift.data(), DType::f32, {B, per_token ? S : 1, D}),
      view(weight.data(), DType::f32, {D}), view(bias.data(), DType::f32, {D}), 1e-6, rms);
  p.out = out.data();
  std::vector<float> scratch(norm_modulate_scratch(D));
  rows(p, 0, 5, scratch.data());  // in two calls, cut in the middle of a batch row
  rows(p, 5, B * S, scratch.data());
  double worst = 0;
  for (int64_t row = 0; row < B * S; ++row) {
    const std::vector<float> one(x.begin() + row * D, x.begin() + (row + 1) * D);
    for (int64_t i = 0; i < D; ++i) {
      const double normed = reference(one, i, 1e-6, rms) * weight[i] + bias[i];
      const double want =
          normed * (1.0 + scale[row / S * D + i]) + shift[(per_token ? row : row / S) * D + i];
      worst = std::max(worst, std::abs(out[row * D + i] - want) / (1.0 + std::abs(want)));
    }
  }
  expect(worst < 1e-5, std::string("norm_modulate ") + name + " D=" + std::to_string(D) +
                           (rms ? " rms" : " layer") + " differs by " + std::to_string(worst));
}

}  // namespace

int main() {
  narrowing_rounds_to_nearest_even();
  checks_name_the_size();
  expect(!error_of([] { isa_from_name("sse9"); }).empty(), "an unknown ISA name is an error");
  cap_isa(Isa::scalar);
  expect(active_isa() == Isa::scalar, "the cap lowers the ISA");
  expect(!active_pairs(), "the cap leaves no products of pairs");
  cap_isa(Isa::avx512_bf16);
  expect(active_isa() == machine_isa(), "the cap never raises the ISA");
  expect(active_pairs() == (machine_isa() == Isa::avx512_bf16), "asked for, pairs are multiplied");
  for (const int64_t D : {1, 3, 17, 40, 64, 129, 1536})
    for (const int mode : {0, 1, 2, 3}) {
      const bool rms = mode & 1, per_token = mode & 2;
      rows_equal_the_reference("scalar", norm_modulate_rows_scalar, D, rms, per_token);
#if defined(SGLD_X86)
      if (machine_isa() >= Isa::avx2)
        rows_equal_the_reference("avx2", norm_modulate_rows_avx2, D, rms, per_token);
      if (machine_isa() >= Isa::avx512)
        rows_equal_the_reference("avx512", norm_modulate_rows_avx512, D, rms, per_token);
      if (machine_isa() >= Isa::avx512_bf16)
        rows_equal_the_reference("avx512_bf16", norm_modulate_rows_avx512_bf16, D, rms, per_token);
#endif
    }
  if (failures == 0) std::printf("selftest: all passed (%s)\n", isa_name(machine_isa()));
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
