// The rows of gate_residual and gate_residual_norm_modulate for one ISA. The norm reads the row of the residual that
// was just written, while it is in L1, as it was rounded: the results equal those of the two ops one after the other.
#pragma once

#include "norm_modulate_rows.h"
#include "sgld/residual.h"

namespace sgld {

template <class V>
struct ResidualKernel {
  using Norm = NormModulateKernel<V>;

  // The gate of a batch row or token, widened.
  static void widen_gate(const GateResidual& p, int64_t b, int64_t s, float* gate) {
    if (p.gate.data) Norm::merge(gate, p.gate, b, s, p.D, [](V, V y) { return y; });
  }

  // kNorm: the pass of the norm over this row, which is longer, fetches the next row of y.
  template <bool kGate, bool kNorm, class T>
  static void row(const T* x, const T* y, const float* gate, T* out, int64_t n, bool stream,
                  int64_t next_x, int64_t next_y) {
    const auto block = [&](int64_t at) {
      const V a = V::load(x + at), b = V::load(y + at);
      const V r = kGate ? fma(b, V::load(gate + at), a) : a + b;
      stream ? r.stream(out + at) : r.store(out + at);
    };
    constexpr int64_t kLine = kLineBytes / sizeof(T);
    int64_t i = 0;
    for (; i + kLine <= n; i += kLine) {
      // The next row comes from memory while this one is computed.
      __builtin_prefetch(x + next_x + i);
      if (!kNorm) __builtin_prefetch(y + next_y + i);
      for (int64_t u = 0; u < kLine; u += V::width) block(i + u);
    }
    for (; i + V::width <= n; i += V::width) block(i);
    for (; i < n; ++i) narrow(widen(x[i]) + (kGate ? widen(y[i]) * gate[i] : widen(y[i])), out + i);
  }

  // Calls f(b, s, residual, next row of y) after each row of the residual.
  template <bool kGate, bool kNorm, class T, class F>
  static void rows(const GateResidual& p, int64_t begin, int64_t end, float* gate, bool stream,
                   F f) {
    int64_t widened = -1;  // the batch row that `gate` holds
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / p.S, s = index % p.S;
      if (kGate && (widened < 0 || p.gate.token || (p.gate.batch && widened != b))) {
        widen_gate(p, b, s, gate);
        widened = b;
      }
      const T* x = static_cast<const T*>(p.x.data) + b * p.x.batch + s * p.x.token;
      const T* y = static_cast<const T*>(p.y.data) + b * p.y.batch + s * p.y.token;
      T* out =
          const_cast<T*>(static_cast<const T*>(p.out.data)) + b * p.out.batch + s * p.out.token;
      row<kGate, kNorm>(x, y, gate, out, p.D, stream, p.x.token, p.y.token);
      f(b, s, out, y + p.y.token);
    }
    V::fence();
  }

  template <class T>
  static void update(const GateResidual& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t bytes = sizeof(T);
    const bool own = p.out.data != p.x.data && p.out.data != p.y.data;
    const bool aligned = p.out.token * bytes % 64 == 0 && p.out.batch * bytes % 64 == 0 &&
                         reinterpret_cast<uintptr_t>(p.out.data) % 64 == 0;
    const bool stream = own && aligned && p.B * p.S * p.D * bytes > kStreamBytes;
    const auto nothing = [](int64_t, int64_t, const T*, const T*) {};
    p.gate.data ? rows<true, false, T>(p, begin, end, scratch, stream, nothing)
                : rows<false, false, T>(p, begin, end, scratch, stream, nothing);
  }

  static void run(const GateResidual& p, int64_t begin, int64_t end, float* scratch) {
    switch (p.x.dtype) {
      case DType::f32:
        return update<float>(p, begin, end, scratch);
      case DType::bf16:
        return update<bf16>(p, begin, end, scratch);
      case DType::f16:
        return update<f16>(p, begin, end, scratch);
    }
  }

  template <bool kGate, bool kAffine, class T>
  static void fused(const GateResidualNormModulate& p, int64_t begin, int64_t end, float* scratch) {
    const NormModulate& norm = p.norm;
    float* a = scratch + norm.D;
    float* c = a + norm.D;
    const bool per_token = norm.scale.token || norm.shift.token;
    const bool per_batch = norm.scale.batch || norm.shift.batch;
    const bool stream = Norm::template streams<T>(norm);
    int64_t folded = -1;  // the batch row that a and c hold
    const auto normed = [&](int64_t b, int64_t s, const T* r, const T* next) {
      if (kAffine && (folded < 0 || per_token || (per_batch && folded != b))) {
        Norm::fold(norm, b, s, a, c);
        folded = b;
      }
      T* out = static_cast<T*>(norm.out) + (b * norm.S + s) * norm.D;
      Norm::template row<kAffine>(r, next, a, c, out, stream, norm);
    };
    rows<kGate, true, T>(p.update, begin, end, scratch, false, normed);
  }

  template <class T>
  static void choose(const GateResidualNormModulate& p, int64_t begin, int64_t end,
                     float* scratch) {
    if (p.update.gate.data)
      p.norm.affine ? fused<true, true, T>(p, begin, end, scratch)
                    : fused<true, false, T>(p, begin, end, scratch);
    else
      p.norm.affine ? fused<false, true, T>(p, begin, end, scratch)
                    : fused<false, false, T>(p, begin, end, scratch);
  }

  static void run_fused(const GateResidualNormModulate& p, int64_t begin, int64_t end,
                        float* scratch) {
    switch (p.update.x.dtype) {
      case DType::f32:
        return choose<float>(p, begin, end, scratch);
      case DType::bf16:
        return choose<bf16>(p, begin, end, scratch);
      case DType::f16:
        return choose<f16>(p, begin, end, scratch);
    }
  }
};

}  // namespace sgld
