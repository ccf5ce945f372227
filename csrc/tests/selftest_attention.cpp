// The pure parts of attention against plain double arithmetic: 2^x of every vector type, the boundary checks, the cut
// into sequences, and the kernels of every ISA this machine has. Run by ctest; needs no torch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention_kernel.h"
#include "expect.h"
#include "sgld/isa.h"

namespace {

using namespace sgld;

View view(std::vector<int64_t> sizes, DType dtype = DType::f32) {
  View v;
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
  const auto bind = [](View q, View k, View v) {
    return error_of([&] { bind_attention(q, k, v, 1.0, false); });
  };
  const View q = view({2, 5, 3, 8}), k = view({2, 7, 3, 8});
  expect(bind(q, k, k).empty(), "cross attention fits");
  expect(bind(q, view({1, 7, 3, 8}), k).find("B is 2") != std::string::npos, "wrong B is named");
  expect(bind(q, view({2, 7, 4, 8}), k).find("H is 3") != std::string::npos, "wrong H is named");
  expect(bind(q, view({2, 7, 3, 16}), k).find("d is 8") != std::string::npos, "wrong d is named");
  expect(bind(q, k, view({2, 6, 3, 8})).find("L is 7") != std::string::npos, "wrong L is named");
  expect(bind(q, view({2, 7, 3, 8}, DType::bf16), k).find("dtype") != std::string::npos,
         "mixed dtypes are an error");
  for (const int64_t d : {4, 12, 264})
    expect(bind(view({1, 1, 1, d}), view({1, 1, 1, d}), view({1, 1, 1, d})).find("multiple") !=
               std::string::npos,
           "head dim " + std::to_string(d) + " is an error");
}

void sequences_are_cut() {
  const View q = view({6, 2, 8}), k = view({9, 2, 8});
  const Attention p = bind_attention(q, k, k, 1.0, true);
  const auto cut = packed_sequences(p, {0, 2, 6}, {0, 9, 9});
  expect(cut.size() == 2 && cut[1].S == 4 && cut[1].L == 0 && cut[1].row == 2 && cut[1].q == 32,
         "cu_seqlens cut queries and keys");
  const auto error = [&](std::vector<int64_t> cu) {
    return !error_of([&] { packed_sequences(p, cu, {0, 9, 9}); }).empty();
  };
  expect(error({0, 6}) && error({0, 7, 6}) && error({1, 2, 6}) && error({0, 2, 5}),
         "wrong cu_seqlens are errors");
}

void powers_of_two() {
  double worst = 0, worst_short = 0;
  for (int i = 0; i <= 100000; ++i) {
    const float x = -static_cast<float>(i) * 0.00125f;
    const double want = std::exp2(static_cast<double>(x));
    const auto off = [&](ScalarVec got) { return std::abs(got.lane[1] - want) / want; };
    worst = std::max(worst, off(exp2_of<false>(ScalarVec::set(x))));
    worst_short = std::max(worst_short, off(exp2_of<true>(ScalarVec::set(x))));
  }
  expect(worst < 2e-7, "2^x differs by " + std::to_string(worst));
  expect(worst_short < 3e-6, "the short 2^x differs by " + std::to_string(worst_short));
  expect(exp2_of<false>(ScalarVec::set(-1e30f)).lane[0] == 0.0f, "2^-1e30 is 0");
  expect(std::isnan(exp2_of<false>(ScalarVec::set(std::nanf(""))).lane[0]), "2^NaN is NaN");
}

std::unique_ptr<void, void (*)(void*)> memory(int64_t bytes) {
  return {std::aligned_alloc(64, static_cast<size_t>(whole(bytes + 64, 64))), std::free};
}

template <class T>
void kernel_equals_the_reference(const std::string& name, const AttentionKernels& kernels,
                                 DType dtype, int64_t S, int64_t L, int64_t d, double limit) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<T> q(S * d), k(L * d), v(L * d), out(S * d);
  for (auto* values : {&q, &k, &v})
    for (T& value : *values) narrow(normal(random), &value);
  std::vector<float> lse(S);
  Attention p = bind_attention(view({1, S, 1, d}, dtype), view({1, L, 1, d}, dtype),
                               view({1, L, 1, d}, dtype), 0.25, false);
  p.q.data = q.data(), p.k.data = k.data(), p.v.data = v.data();
  p.out = out.data(), p.lse = lse.data();
  const Sequence sequence = dense_sequences(p)[0];
  const auto packed = memory(kernels.packed_bytes(d, L)),
             scratch = memory(kernels.scratch_bytes(d));
  for (int64_t i = 0; i < L; i += 3 * kKeyStep)
    kernels.pack(p, sequence, 0, i, std::min(L, i + 3 * kKeyStep), packed.get());
  for (int64_t i = 0; i < S; i += kernels.query_rows)
    kernels.attend(p, sequence, 0, i, std::min(S, i + kernels.query_rows), packed.get(),
                   scratch.get());
  double worst = 0;
  for (int64_t i = 0; i < S; ++i) {
    std::vector<double> weight(L);
    double sum = 0;
    for (int64_t j = 0; j < L; ++j) {
      double score = 0;
      for (int64_t c = 0; c < d; ++c)
        score += static_cast<double>(widen(q[i * d + c])) * widen(k[j * d + c]);
      sum += weight[j] = std::exp(score * 0.25);
    }
    worst = std::max(worst, std::abs(lse[i] - std::log(sum)));
    for (int64_t c = 0; c < d; ++c) {
      double want = 0;
      for (int64_t j = 0; j < L; ++j) want += weight[j] / sum * widen(v[j * d + c]);
      worst = std::max(worst, std::abs(widen(out[i * d + c]) - want));
    }
  }
  expect(worst < limit, "attention " + name + ' ' + std::to_string(S) + 'x' + std::to_string(L) +
                            'x' + std::to_string(d) + " differs by " + std::to_string(worst));
}

void merged_rows(const char* name, void (*rows)(const AttentionMerge&, int64_t, int64_t)) {
  const float a[] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, b[] = {9, 8, 7, 6, 5, 4, 3, 2, 1};
  const float none = -std::numeric_limits<float>::infinity();
  float out[9];
  for (const auto& [x, y, share] : {std::tuple{0.0f, std::log(3.0f), 0.25f},
                                    std::tuple{5.0f, none, 1.0f}, std::tuple{none, 90.0f, 0.0f}}) {
    float lse = 0;
    AttentionMerge p;
    p.a = a, p.b = b, p.lse_a = &x, p.lse_b = &y, p.out = out, p.lse = &lse;
    p.B = p.S = p.H = 1, p.d = 9;
    rows(p, 0, 1);
    double worst = std::abs(lse - std::log(std::exp(double{x}) + std::exp(double{y})));
    for (int i = 0; i < 9; ++i)
      worst = std::max(worst, std::abs(out[i] - (a[i] * share + b[i] * (1.0 - share))));
    expect(worst < 1e-5, std::string("attention_merge ") + name);
  }
}

void kernels(const std::string& name, const AttentionKernels& kernels, bool wide) {
  for (const auto& [S, L, d] :
       {std::tuple{1, 1, 8}, std::tuple{33, 70, 40}, std::tuple{7, 300, 64},
        std::tuple{20, 2100, 32}, std::tuple{300, 257, 128}, std::tuple{70, 600, 96}}) {
    kernel_equals_the_reference<bf16>(name, kernels, DType::bf16, S, L, d, 2e-2);
    if (!wide) continue;
    kernel_equals_the_reference<float>(name, kernels, DType::f32, S, L, d, 2e-5);
    kernel_equals_the_reference<f16>(name, kernels, DType::f16, S, L, d, 3e-3);
  }
}

}  // namespace

int main() {
  checks_name_the_size();
  sequences_are_cut();
  powers_of_two();
  kernels("scalar", attention_scalar(), true);
  merged_rows("scalar", attention_merge_rows_scalar);
#if defined(SGLD_X86)
  if (machine_isa() >= Isa::avx2) {
    kernels("avx2", attention_avx2(), true);
    merged_rows("avx2", attention_merge_rows_avx2);
  }
  if (machine_isa() >= Isa::avx512) {
    kernels("avx512", attention_avx512(), true);
    merged_rows("avx512", attention_merge_rows_avx512);
  }
  if (machine_isa() >= Isa::avx512_bf16) kernels("avx512_bf16", attention_avx512_bf16(), false);
  if (active_amx()) kernels("amx_bf16", attention_amx(), false);
#endif
  if (failures == 0) std::printf("selftest_attention: all passed\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
