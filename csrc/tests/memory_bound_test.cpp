// The rows of the memory-bound ops on every ISA this machine has against plain double arithmetic, and their boundary
// checks. Run by ctest; needs no torch.
#include "memory_bound.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "expect.h"
#include "sgld/isa.h"

namespace {

using namespace sgld;
using Floats = std::vector<float>;

std::mt19937 random_bits(11);

Floats normal(int64_t n) {
  std::normal_distribution<float> distribution(0.5f, 2.0f);
  Floats values(n);
  for (float& value : values) value = distribution(random_bits);
  return values;
}

View view(const Floats& data, std::vector<int64_t> sizes) {
  View v;
  v.data = data.data();
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

void expect_close(const Floats& got, const std::vector<double>& want, const std::string& what) {
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i)
    worst = std::max(worst, std::abs(got[i] - want[i]) / (1.0 + std::abs(want[i])));
  expect(worst < 1e-5, what + " differs by " + std::to_string(worst));
}

void residual(const MemoryBoundRows& rows, int64_t D, const std::string& level) {
  const int64_t B = 2, S = 5;
  const Floats x = normal(B * S * D), y = normal(B * S * D), gate = normal(B * D);
  const Floats scale = normal(B * D);
  Floats out(x.size()), normed(x.size()), scratch(gate_residual_norm_modulate_scratch(D));
  const GateResidualNormModulate p = bind_gate_residual_norm_modulate(
      view(x, {B, S, D}), view(y, {B, S, D}), view(gate, {B, D}), view(scale, {B, D}), {}, {}, {},
      1e-6, false, view(out, {B, S, D}), view(normed, {B, S, D}));
  rows.gate_residual_norm_modulate(p, 0, 3, scratch.data());
  rows.gate_residual_norm_modulate(p, 3, B * S, scratch.data());
  std::vector<double> want(x.size()), want_normed(x.size());
  for (int64_t row = 0; row < B * S; ++row) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < D; ++i) {
      const int64_t at = row * D + i;
      want[at] = x[at] + double{y[at]} * gate[row / S * D + i];
      mean += want[at] / D;
    }
    for (int64_t i = 0; i < D; ++i) square += std::pow(want[row * D + i] - mean, 2) / D;
    for (int64_t i = 0; i < D; ++i)
      want_normed[row * D + i] =
          (want[row * D + i] - mean) / std::sqrt(square + 1e-6) * (1.0 + scale[row / S * D + i]);
  }
  expect_close(out, want, level + " residual D=" + std::to_string(D));
  if (D > 1) expect_close(normed, want_normed, level + " normed D=" + std::to_string(D));
  Floats plain(x.size());
  const GateResidual q = bind_gate_residual(view(x, {B, S, D}), view(y, {B, S, D}),
                                            view(gate, {B, D}), view(plain, {B, S, D}));
  rows.gate_residual(q, 0, B * S, scratch.data());
  expect(plain == out, level + " gate_residual and the fused op agree");
}

void rope(const MemoryBoundRows& rows, int64_t d, bool per_head, bool half,
          const std::string& level) {
  const int64_t S = 3, H = 2, width = H * d;
  const Floats q = normal(S * width), weight = normal(per_head ? d : width);
  Floats k = normal(S * width), cos = normal(S * d / 2), sin = normal(S * d / 2);
  const Floats k_before = k;
  Floats q_out(q.size());
  const QkNormRope p = bind_qk_norm_rope(
      view(q, {1, S, H, d}), view(k, {1, S, H, d}), view(weight, {per_head ? d : width}), {},
      view(cos, {S, d / 2}), view(sin, {S, d / 2}), 1e-6, per_head, half, view(q_out, {1, S, H, d}),
      view(k, {1, S, H, d}));  // k in place
  Floats scratch(qk_norm_rope_scratch(p));
  rows.qk_norm_rope(p, 0, S - 1, scratch.data());
  rows.qk_norm_rope(p, S - 1, 2 * S, scratch.data());
  const auto want = [&](const Floats& x, bool weighted) {
    std::vector<double> y(x.begin(), x.end()), turned(x.size());
    for (int64_t s = 0; s < S; ++s)
      for (int64_t h = 0; h < H; ++h) {
        double square = 0;
        const int64_t first = per_head ? s * width + h * d : s * width;
        const int64_t n = per_head ? d : width;
        for (int64_t i = 0; i < n; ++i) square += double{x[first + i]} * x[first + i] / n;
        for (int64_t i = 0; weighted && i < d; ++i)
          y[s * width + h * d + i] *= weight[per_head ? i : h * d + i] / std::sqrt(square + 1e-6);
        for (int64_t i = 0; i < d / 2; ++i) {
          const int64_t at = s * width + h * d;
          const int64_t a = at + (half ? i : 2 * i), b = at + (half ? i + d / 2 : 2 * i + 1);
          const double c = cos[s * d / 2 + i], z = sin[s * d / 2 + i];
          turned[a] = y[a] * c - y[b] * z;
          turned[b] = y[a] * z + y[b] * c;
        }
      }
    return turned;
  };
  const std::string what = level + " rope d=" + std::to_string(d) + (half ? " half" : "");
  expect_close(q_out, want(q, true), what + " q");
  expect_close(k, want(k_before, false), what + " k");
}

void activations(const MemoryBoundRows& rows, int64_t n, const std::string& level) {
  const Floats x = normal(n), up = normal(n);
  Floats gelu(n), silu(n);
  std::vector<double> want_gelu(n), want_silu(n);
  for (int64_t i = 0; i < n; ++i) {
    const double v = x[i], u = std::sqrt(2.0 / M_PI) * (v + 0.044715 * v * v * v);
    want_gelu[i] = 0.5 * v * (1.0 + std::tanh(u));
    want_silu[i] = v / (1.0 + std::exp(-v)) * up[i];
  }
  const Elementwise g = bind_elementwise(kGeluTanh, view(x, {n}), {}, view(gelu, {n}));
  const Elementwise s = bind_elementwise(kSiluMul, view(x, {n}), view(up, {n}), view(silu, {n}));
  rows.gelu_tanh(g, 0, g.S);
  rows.silu_mul(s, 0, s.S);
  expect_close(gelu, want_gelu, level + " gelu n=" + std::to_string(n));
  expect_close(silu, want_silu, level + " silu n=" + std::to_string(n));
}

void fp8(const MemoryBoundRows& rows, const std::string& level) {
  // Scale 1: 448 is there. Ties go to even, below 2^-6 the spacing is 2^-9.
  const Floats x = {448.0f, -448.0f, 1.0f, 1.0625f, 1.1875f, 0x1p-9f, 0x1p-10f, 0x1.8p-9f, -0.0f};
  const uint8_t want[] = {0x7e, 0xfe, 0x38, 0x38, 0x3a, 0x01, 0x00, 0x02, 0x80};
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<uint8_t> out(x.size());
  Floats scratch(quant_fp8_rowwise_scratch(n)), scale(1);
  QuantRows p = bind_quant_fp8_rowwise(view(x, {1, n}));
  p.out = out.data();
  p.scale = scale.data();
  rows.quant_fp8_rowwise(p, 0, 1, scratch.data());
  expect(scale[0] == 1.0f, level + " fp8 scale");
  for (int64_t i = 0; i < n; ++i)
    expect(out[i] == want[i], level + " fp8 code of " + std::to_string(x[i]));
}

void checks_name_the_size() {
  const Floats x(48);
  const auto residual_of = [&](std::vector<int64_t> y, std::vector<int64_t> gate) {
    return error_of([&] {
      bind_gate_residual(view(x, {2, 3, 8}), view(x, y), view(x, gate), view(x, {2, 3, 8}));
    });
  };
  expect(residual_of({2, 3, 8}, {2, 8}).empty(), "[B, D] gate fits");
  expect(residual_of({2, 3, 7}, {8}).find("D is 8") != std::string::npos, "y with a wrong D");
  expect(residual_of({2, 3, 8}, {3, 8}).find("B is 2") != std::string::npos, "gate with a wrong B");
  const auto rope_of = [&](std::vector<int64_t> weight, std::vector<int64_t> cos) {
    const View q = view(x, {1, 3, 2, 8});
    return error_of([&] {
      bind_qk_norm_rope(q, q, view(x, weight), {}, view(x, cos), view(x, cos), 0, false, false, q,
                        q);
    });
  };
  expect(rope_of({16}, {3, 4}).empty(), "weight [H*d] and angles [S, d/2] fit");
  expect(rope_of({8}, {3, 4}).find("H*d is 16") != std::string::npos, "a wrong weight is named");
  expect(rope_of({16}, {2, 4}).find("S is 3") != std::string::npos, "wrong angles are named");
}

}  // namespace

int main() {
  checks_name_the_size();
  for (const Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::avx512_bf16}) {
    if (isa > machine_isa()) continue;
    const MemoryBoundRows& rows = memory_bound_rows(isa);
    const std::string level = isa_name(isa);
    for (const int64_t D : {1, 3, 17, 40, 64, 129, 1536}) residual(rows, D, level);
    for (const int64_t d : {2, 24, 40, 64, 128})
      for (const int mode : {0, 1, 2, 3}) rope(rows, d, mode & 1, mode & 2, level);
    for (const int64_t n : {1, 15, 33, 8192, 8197}) activations(rows, n, level);
    fp8(rows, level);
  }
  if (failures == 0) std::printf("memory_bound_test: all passed (%s)\n", isa_name(machine_isa()));
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
